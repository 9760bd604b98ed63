"""LiteLLM, with the prefix openai/ of its OpenAI-compatible provider."""

from __future__ import annotations

import litellm

from checks import (
    ADD,
    AUDIO,
    BASE,
    COUNT,
    COUNT_ANSWER,
    HEAR,
    HEAR_ANSWER,
    IMAGE,
    KEY,
    MODEL,
    SEE,
    SEE_ANSWER,
    SOUND,
    SUM,
    SUM_ANSWER,
    TRIP,
    Checks,
    is_sum,
    is_trip,
    raised,
    tool,
)
from models import Add, Trip

check = Checks("litellm", "litellm")
litellm.suppress_debug_info = True


def ask(content: str | list[dict], *before, **options):
    messages = [*before, {"role": "user", "content": content}]
    where = {"model": f"openai/{MODEL}", "api_base": BASE, "api_key": KEY, "temperature": 0}
    return litellm.completion(messages=messages, **where | options)


def message(*given, **options):
    return ask(*given, **options).choices[0].message


@check("text")
def _() -> None:
    answer = ask(SUM)
    assert answer.choices[0].message.content == SUM_ANSWER and answer.usage.completion_tokens > 3
    where = {"model": f"text-completion-openai/{MODEL}", "api_base": BASE, "api_key": KEY}
    assert litellm.text_completion(prompt=SUM, max_tokens=4, **where).choices[0].text


@check("stream")
def _() -> None:
    events = [*ask(SUM, stream=True, stream_options={"include_usage": True})]
    assert "".join(each.choices[0].delta.content or "" for each in events if each.choices) == SUM_ANSWER
    assert litellm.stream_chunk_builder(events).usage.completion_tokens > 3


@check("image")
def _() -> None:
    assert message([IMAGE, {"type": "text", "text": SEE}]).content == SEE_ANSWER


@check("audio")
def _() -> None:
    assert message([AUDIO, {"type": "text", "text": HEAR}]).content == HEAR_ANSWER
    with SOUND.open("rb") as file:
        heard = litellm.transcription(model=f"openai/{MODEL}", file=file, prompt=HEAR, api_base=BASE, api_key=KEY)
    assert heard.text == HEAR_ANSWER


@check("tools offered")
def _() -> None:
    answer = message(SUM, tools=[tool("add", ADD)])
    assert answer.content and not answer.tool_calls


@check("tools forced")
def _() -> None:
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        (call,) = message(SUM, tools=[tool("add", ADD)], tool_choice=choice).tool_calls
        assert is_sum(call.function.arguments)
    events = [*ask(SUM, tools=[tool("add", ADD)], tool_choice="required", stream=True)]
    (call,) = litellm.stream_chunk_builder(events).choices[0].message.tool_calls
    assert is_sum(call.function.arguments)


@check("parallel tools")
def _() -> None:
    calls = message(SUM, tools=[tool("add", ADD)], tool_choice="required", parallel_tool_calls=True).tool_calls
    assert calls and all(is_sum(call.function.arguments) for call in calls)


@check("nested tools")
def _() -> None:
    (call,) = message(SUM, tools=[tool("plan", TRIP)], tool_choice="required").tool_calls
    assert is_trip(call.function.arguments)


@check("structured")
def _() -> None:
    for model in (Add, Trip):
        assert model.model_validate_json(message(SUM, response_format=model).content)


@check("errors")
def _() -> None:
    wrong = {
        litellm.NotFoundError: {"model": "openai/other"},
        litellm.BadRequestError: {"temperature": -1},
        litellm.AuthenticationError: {"api_key": "wrong"},
    }
    for kind, options in wrong.items():
        for stream in (False, True):
            raised(kind, ask, SUM, stream=stream, **options)


@check("history")
def _() -> None:
    seen, said = {"role": "user", "content": [IMAGE, {"type": "text", "text": SEE}]}, {"role": "assistant"}
    assert message(COUNT, seen, said | {"content": SEE_ANSWER}).content == COUNT_ANSWER
    tools = [tool("add", ADD)]
    called = message(SUM, tools=tools, tool_choice="required")
    before = {"role": "user", "content": SUM}, called
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id}
    assert message(SUM, *before, result | {"content": "7"}, tools=tools).content
    assert message(SEE, *before, result | {"content": [IMAGE]}).content == SEE_ANSWER
