"""OpenAI's client: responses."""

from __future__ import annotations

import openai

from checks import (
    ADD,
    AUDIO,
    BASE,
    COUNT,
    COUNT_ANSWER,
    HEAR,
    HEAR_ANSWER,
    KEY,
    MODEL,
    PICTURE_URL,
    SEE,
    SEE_ANSWER,
    SUM,
    SUM_ANSWER,
    TRIP,
    Checks,
    is_sum,
    is_trip,
    raised,
)
from models import Add, Trip

client = openai.OpenAI(base_url=BASE, api_key=KEY, max_retries=0)
check = Checks("openai, responses", "openai")
SEEN = {
    "role": "user",
    "content": [{"type": "input_image", "image_url": PICTURE_URL}, {"type": "input_text", "text": SEE}],
}


def tool(name: str, parameters: dict) -> dict:
    return {"type": "function", "name": name, "description": name, "parameters": parameters, "strict": True}


def ask(given: str | list, **options):
    return client.responses.create(model=MODEL, input=given, **{"temperature": 0} | options)


def calls_of(answer) -> list:
    return [item for item in answer.output if item.type == "function_call"]


@check("text")
def _() -> None:
    answer = ask(SUM, instructions="Be brief.")
    assert answer.status == "completed" and answer.output_text and answer.usage.output_tokens > 3
    assert ask(SUM).output_text == SUM_ANSWER
    assert client.responses.retrieve(answer.id).output_text == answer.output_text


@check("stream")
def _() -> None:
    assert "".join(event.delta for event in ask(SUM, stream=True) if event.type.endswith("text.delta")) == SUM_ANSWER
    with client.responses.stream(model=MODEL, input=SUM, temperature=0) as run:
        assert run.get_final_response().output_text == SUM_ANSWER


@check("image")
def _() -> None:
    assert ask([SEEN]).output_text == SEE_ANSWER


@check("audio")
def _() -> None:
    assert ask([{"role": "user", "content": [AUDIO, {"type": "input_text", "text": HEAR}]}]).output_text == HEAR_ANSWER


@check("tools offered")
def _() -> None:
    answer = ask(SUM, tools=[tool("add", ADD)])
    assert answer.output_text and not calls_of(answer)


@check("tools forced")
def _() -> None:
    for choice in ("required", {"type": "function", "name": "add"}):
        (call,) = calls_of(ask(SUM, tools=[tool("add", ADD)], tool_choice=choice))
        assert is_sum(call.arguments)
    forced = {"tools": [openai.pydantic_function_tool(Add)], "tool_choice": "required"}
    with client.responses.stream(model=MODEL, input=SUM, temperature=0, **forced) as run:
        (call,) = calls_of(run.get_final_response())
    assert isinstance(call.parsed_arguments, Add)


@check("parallel tools")
def _() -> None:
    calls = calls_of(ask(SUM, tools=[tool("add", ADD)], tool_choice="required", parallel_tool_calls=True))
    assert calls and all(is_sum(call.arguments) for call in calls)


@check("nested tools")
def _() -> None:
    (call,) = calls_of(ask(SUM, tools=[tool("plan", TRIP)], tool_choice="required"))
    assert is_trip(call.arguments)


@check("structured")
def _() -> None:
    for model in (Add, Trip):
        assert isinstance(client.responses.parse(model=MODEL, input=SUM, text_format=model).output_parsed, model)


@check("errors")
def _() -> None:
    wrong = {openai.NotFoundError: {"model": "other"}, openai.BadRequestError: {"temperature": -1}}
    for kind, options in wrong.items():
        for stream in (False, True):
            asked = {"model": MODEL, "input": SUM, "stream": stream}
            assert raised(kind, client.responses.create, **asked | options).body["message"]


@check("history")
def _() -> None:
    seen = ask([SEEN])
    assert ask(COUNT, previous_response_id=seen.id).output_text == COUNT_ANSWER
    assert ask([SEEN, *seen.output, {"role": "user", "content": COUNT}]).output_text == COUNT_ANSWER
    called = ask(SUM, tools=[tool("add", ADD)], tool_choice="required")
    (call,) = calls_of(called)
    result = {"type": "function_call_output", "call_id": call.call_id}
    assert ask([result | {"output": "7"}], previous_response_id=called.id).status == "completed"
    shown = result | {"output": [{"type": "input_image", "image_url": PICTURE_URL}]}
    again = {"role": "user", "content": SEE}
    assert ask([{"role": "user", "content": SUM}, *called.output, shown, again]).output_text == SEE_ANSWER
