"""Anthropic's client."""

from __future__ import annotations

import anthropic

from checks import (
    ADD,
    COUNT,
    COUNT_ANSWER,
    KEY,
    MODEL,
    PICTURE_BASE64,
    SEE,
    SEE_ANSWER,
    SUM,
    SUM_ANSWER,
    TRIP,
    URL,
    Checks,
    is_sum,
    is_trip,
    raised,
)
from models import Add, Trip

check = Checks("anthropic", "anthropic")
client = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0)
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PICTURE_BASE64}}
# The client has no option for the temperature any more.
ASKED = {"model": MODEL, "max_tokens": 200, "extra_body": {"temperature": 0}}
SEEN = {"role": "user", "content": [IMAGE, {"type": "text", "text": SEE}]}


def tool(name: str, schema: dict) -> dict:
    return {"name": name, "description": name, "input_schema": schema}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def ask(*messages, **options):
    return client.messages.create(messages=[*messages], **ASKED | options)


def text_of(message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


@check("text")
def _() -> None:
    answer = ask(user(SUM))
    assert text_of(answer) == SUM_ANSWER and answer.stop_reason == "end_turn" and answer.usage.output_tokens > 3
    assert text_of(ask(user(SUM), stop_sequences=[" is"])) == "3 plus 4"
    cached = {"cache_control": {"type": "ephemeral"}}
    assert text_of(ask(user(SUM), system=[{"type": "text", "text": "Be brief."} | cached], **cached))
    assert client.messages.count_tokens(model=MODEL, messages=[user(SUM)]).input_tokens > 3
    assert MODEL in [model.id for model in client.models.list()]


@check("stream")
def _() -> None:
    with client.messages.stream(**ASKED, messages=[user(SUM)]) as run:
        assert "".join(run.text_stream) == SUM_ANSWER
        assert run.get_final_message().stop_reason == "end_turn"
    assert [event.type for event in ask(user(SUM), stream=True)][-1] == "message_stop"


@check("image")
def _() -> None:
    assert text_of(ask(SEEN)) == SEE_ANSWER


check.cannot("audio", "Anthropic's API takes no sound")


@check("tools offered")
def _() -> None:
    answer = ask(user(SUM), tools=[tool("add", ADD)])
    assert text_of(answer) and answer.stop_reason != "tool_use"


@check("tools forced")
def _() -> None:
    for choice in ({"type": "any"}, {"type": "tool", "name": "add"}):
        answer = ask(user(SUM), tools=[tool("add", ADD)], tool_choice=choice)
        (call,) = answer.content
        assert call.type == "tool_use" and is_sum(call.input) and answer.stop_reason == "tool_use"
    forced = {"tools": [tool("add", ADD)], "tool_choice": {"type": "any"}}
    with client.messages.stream(**ASKED, messages=[user(SUM)], **forced) as run:
        (call,) = run.get_final_message().content
    assert is_sum(call.input)


@check("parallel tools")
def _() -> None:
    choice = {"type": "any", "disable_parallel_tool_use": False}
    calls = ask(user(SUM), tools=[tool("add", ADD)], tool_choice=choice).content
    assert calls and all(is_sum(call.input) for call in calls)


@check("nested tools")
def _() -> None:
    (call,) = ask(user(SUM), tools=[tool("plan", TRIP)], tool_choice={"type": "any"}).content
    assert is_trip(call.input)


@check("structured")
def _() -> None:
    for model in (Add, Trip):
        answer = client.messages.parse(**ASKED, messages=[user(SUM)], output_format=model)
        assert isinstance(answer.parsed_output, model)


@check("errors")
def _() -> None:
    stranger = client.with_options(api_key="wrong")
    wrong = {
        "not_found_error": (anthropic.NotFoundError, client, {"model": "other"}),
        "invalid_request_error": (anthropic.BadRequestError, client, {"extra_body": {"temperature": -1}}),
        "authentication_error": (anthropic.AuthenticationError, stranger, {}),
    }
    for name, (kind, who, options) in wrong.items():
        for stream in (False, True):
            asked = {"messages": [user(SUM)], "stream": stream}
            error = raised(kind, who.messages.create, **ASKED | asked | options)
            assert error.body["type"] == "error" and error.body["error"]["type"] == name


@check("history")
def _() -> None:
    assert text_of(ask(SEEN, {"role": "assistant", "content": SEE_ANSWER}, user(COUNT))) == COUNT_ANSWER
    tools = [tool("add", ADD)]
    called = ask(user(SUM), tools=tools, tool_choice={"type": "any"})
    result = {"type": "tool_result", "tool_use_id": called.content[0].id}
    before = user(SUM), {"role": "assistant", "content": called.content}
    assert ask(*before, {"role": "user", "content": [result | {"content": "7"}]}, tools=tools).stop_reason == "end_turn"
    for content in ([IMAGE], [{"type": "text", "text": "Here it is:"}, IMAGE]):
        shown = [result | {"content": content}, {"type": "text", "text": SEE}]
        assert text_of(ask(*before, {"role": "user", "content": shown})) == SEE_ANSWER
    failed = [result | {"content": "no", "is_error": True}, {"type": "text", "text": SUM}]
    assert ask(*before, {"role": "user", "content": failed}).stop_reason == "end_turn"
