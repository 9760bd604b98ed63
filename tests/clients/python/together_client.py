"""Together's client."""

from __future__ import annotations

import together

from checks import (
    ADD,
    AUDIO,
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
    SOUND_BASE64,
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

check = Checks("together", "together")
client = together.Together(base_url=URL, api_key=KEY, max_retries=0)


def ask(content: str | list[dict], *before, **options):
    messages = [*before, {"role": "user", "content": content}]
    made = client.chat.completions.create(messages=messages, **{"model": MODEL, "temperature": 0} | options)
    return made if options.get("stream") else made.choices[0].message


@check("text")
def _() -> None:
    assert ask(SUM, top_k=50, repetition_penalty=1.0, min_p=0.0).content == SUM_ANSWER
    assert client.completions.create(model=MODEL, prompt=SUM, max_tokens=4).choices[0].text


@check("stream")
def _() -> None:
    events = [*ask(SUM, stream=True)]
    assert "".join(each.choices[0].delta.content or "" for each in events if each.choices) == SUM_ANSWER


@check("image")
def _() -> None:
    assert ask([IMAGE, {"type": "text", "text": SEE}]).content == SEE_ANSWER


@check("audio")
def _() -> None:
    parts = (
        AUDIO,
        {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{SOUND_BASE64}"}},
    )
    for part in parts:
        assert ask([part, {"type": "text", "text": HEAR}]).content == HEAR_ANSWER
    assert client.audio.transcriptions.create(model=MODEL, file=SOUND, prompt=HEAR).text == HEAR_ANSWER


@check("tools offered")
def _() -> None:
    answer = ask(SUM, tools=[tool("add", ADD)])
    assert answer.content and not answer.tool_calls


@check("tools forced")
def _() -> None:
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        (call,) = ask(SUM, tools=[tool("add", ADD)], tool_choice=choice).tool_calls
        assert is_sum(call.function.arguments)


check.cannot("parallel tools", "the client has no such option")


@check("nested tools")
def _() -> None:
    (call,) = ask(SUM, tools=[tool("plan", TRIP)], tool_choice="required").tool_calls
    assert is_trip(call.function.arguments)


@check("structured")
def _() -> None:
    for model in (Add, Trip):
        wanted = {"name": model.__name__, "schema": model.model_json_schema()}
        answer = ask(SUM, response_format={"type": "json_schema", "json_schema": wanted})
        assert model.model_validate_json(answer.content)


@check("errors")
def _() -> None:
    wrong = {together.NotFoundError: {"model": "other"}, together.BadRequestError: {"temperature": -1}}
    for kind, options in wrong.items():
        for stream in (False, True):
            raised(kind, ask, SUM, stream=stream, **options)


@check("history")
def _() -> None:
    seen, said = {"role": "user", "content": [IMAGE, {"type": "text", "text": SEE}]}, {"role": "assistant"}
    assert ask(COUNT, seen, said | {"content": SEE_ANSWER}).content == COUNT_ANSWER
    tools = [tool("add", ADD)]
    called = ask(SUM, tools=tools, tool_choice="required").model_dump()
    before = {"role": "user", "content": SUM}, called
    result = {"role": "tool", "tool_call_id": called["tool_calls"][0]["id"], "content": "7"}
    assert ask([IMAGE, {"type": "text", "text": SEE}], *before, result).content == SEE_ANSWER
