"""OpenAI's client: chat completions."""

from __future__ import annotations

import json

import openai

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
    URL,
    Checks,
    is_sum,
    is_trip,
    raised,
    tool,
)
from models import Add, Trip

client = openai.OpenAI(base_url=BASE, api_key=KEY, max_retries=0)
check = Checks("openai", "openai")


def ask(content: str | list[dict], *before: dict, **options):
    messages = [*before, {"role": "user", "content": content}]
    made = client.chat.completions.create(model=MODEL, messages=messages, **{"temperature": 0} | options)
    return made if options.get("stream") else made.choices[0].message


@check("text")
def _() -> None:
    assert ask(SUM).content == SUM_ANSWER
    assert client.models.retrieve(MODEL).id == MODEL


@check("stream")
def _() -> None:
    events = [*ask(SUM, stream=True, stream_options={"include_usage": True})]
    assert "".join(each.choices[0].delta.content or "" for each in events if each.choices) == SUM_ANSWER
    assert events[-1].usage.completion_tokens > 3
    with client.chat.completions.stream(model=MODEL, messages=[{"role": "user", "content": SUM}], temperature=0) as run:
        assert run.get_final_completion().choices[0].message.content == SUM_ANSWER


@check("image")
def _() -> None:
    assert ask([IMAGE, {"type": "text", "text": SEE}]).content == SEE_ANSWER


@check("audio")
def _() -> None:
    assert ask([AUDIO, {"type": "text", "text": HEAR}]).content == HEAR_ANSWER
    assert client.audio.transcriptions.create(model=MODEL, file=SOUND, prompt=HEAR).text == HEAR_ANSWER


@check("tools offered")
def _() -> None:
    answer = ask(SUM, tools=[tool("add", ADD)])
    assert answer.content and not answer.tool_calls


@check("tools forced")
def _() -> None:
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        (call,) = ask(SUM, tools=[tool("add", ADD), tool("sub", ADD)], tool_choice=choice).tool_calls
        assert call.function.name in ("add", "sub") and is_sum(call.function.arguments)
    asked = {"model": MODEL, "messages": [{"role": "user", "content": SUM}], "temperature": 0}
    forced = {"tools": [openai.pydantic_function_tool(Add)], "tool_choice": "required"}
    with client.chat.completions.stream(**asked, **forced) as run:
        (call,) = run.get_final_completion().choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Add)


@check("parallel tools")
def _() -> None:
    # A list of calls begins with a bracket, and goes on with a comma.
    root = client.with_options(base_url=URL)
    tokens = [root.post("/tokenize", body={"content": text}, cast_to=object)["tokens"] for text in "[,"]
    several = {"logit_bias": {str(token): 100 for (token,) in tokens}, "parallel_tool_calls": True}
    forced = {"tools": [openai.pydantic_function_tool(Add)], "tool_choice": "required"} | several
    asked = {"model": MODEL, "messages": [{"role": "user", "content": SUM}], "temperature": 0}
    calls = ask(SUM, **forced).tool_calls
    with client.chat.completions.stream(**asked, **forced) as run:
        streamed = run.get_final_completion().choices[0].message.tool_calls
    assert len(calls) == len(streamed) > 1
    assert all(isinstance(call.function.parsed_arguments, Add) for call in streamed)


@check("nested tools")
def _() -> None:
    (call,) = ask(SUM, tools=[tool("plan", TRIP)], tool_choice="required").tool_calls
    assert is_trip(call.function.arguments)
    strict = openai.pydantic_function_tool(Trip)
    (call,) = ask(SUM, tools=[strict], tool_choice="required").tool_calls
    assert is_trip(call.function.arguments)


@check("structured")
def _() -> None:
    asked = {"model": MODEL, "messages": [{"role": "user", "content": SUM}], "temperature": 0}
    for model in (Add, Trip):
        parsed = client.chat.completions.parse(**asked, response_format=model).choices[0].message.parsed
        assert isinstance(parsed, model)
    with client.chat.completions.stream(**asked, response_format=Trip) as run:
        assert isinstance(run.get_final_completion().choices[0].message.parsed, Trip)
    # The demo does not know when to end an object, so some are cut.
    wanted = {"response_format": {"type": "json_object"}, "n": 4, "max_tokens": 200}
    choices = client.chat.completions.create(**asked | wanted | {"temperature": 1, "seed": 0}).choices
    ended = [json.loads(choice.message.content) for choice in choices if choice.finish_reason == "stop"]
    assert ended and all(isinstance(found, dict) for found in ended)


@check("errors")
def _() -> None:
    wrong = {
        openai.NotFoundError: {"model": "other"},
        openai.BadRequestError: {"temperature": -1},
        openai.AuthenticationError: {"extra_headers": {"Authorization": "Bearer wrong"}},
    }
    for kind, options in wrong.items():
        for stream in (False, True):
            asked = {"model": MODEL, "messages": [{"role": "user", "content": SUM}], "stream": stream}
            assert raised(kind, client.chat.completions.create, **asked | options).body["message"]


@check("history")
def _() -> None:
    seen, said = {"role": "user", "content": [IMAGE, {"type": "text", "text": SEE}]}, {"role": "assistant"}
    assert ask(COUNT, seen, said | {"content": SEE_ANSWER}).content == COUNT_ANSWER
    tools = [tool("add", ADD)]
    called = ask(SUM, tools=tools, tool_choice="required")
    before = {"role": "user", "content": SUM}, called
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id}
    assert ask(SUM, *before, result | {"content": "7"}, tools=tools).content
    assert ask(SEE, *before, result | {"content": [IMAGE]}).content == SEE_ANSWER
