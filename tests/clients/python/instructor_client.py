"""Instructor over OpenAI's client, in the modes that ask for a call and for a schema."""

from __future__ import annotations

import instructor
from instructor.exceptions import InstructorRetryException
from instructor.processing.multimodal import Audio, Image

from checks import (
    BASE,
    COUNT,
    COUNT_ANSWER,
    HEAR,
    HEAR_ANSWER,
    KEY,
    MODEL,
    PICTURE,
    SEE,
    SEE_ANSWER,
    SOUND,
    SUM,
    SUM_ANSWER,
    Checks,
    raised,
)
from models import Add, Trip

check = Checks("instructor", "instructor")
tools, schema = (
    instructor.from_provider(f"openai/{MODEL}", base_url=BASE, api_key=KEY, mode=mode, max_retries=0)
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA)
)


def user(*content) -> dict:
    return {"role": "user", "content": [*content]}


def ask(client, response_model, *messages, **options):
    return client.create(response_model=response_model, messages=[*messages], temperature=0, max_retries=0, **options)


def text_of(*messages) -> str:
    return ask(tools, None, *messages).choices[0].message.content


@check("text")
def _() -> None:
    assert text_of(user(SUM)) == SUM_ANSWER


@check("stream")
def _() -> None:
    for client in (tools, schema):
        asked = {"messages": [user(SUM)], "temperature": 0, "max_retries": 0}
        *_, last = client.create_partial(response_model=Add, **asked)
        assert Add.model_validate(last.model_dump())


@check("image")
def _() -> None:
    assert text_of(user(Image.from_path(PICTURE), SEE)) == SEE_ANSWER


@check("audio")
def _() -> None:
    assert text_of(user(Audio.from_path(SOUND), HEAR)) == HEAR_ANSWER


check.cannot("tools offered", "it always forces a call")


@check("tools forced")
def _() -> None:
    made, answer = tools.create_with_completion(response_model=Add, messages=[user(SUM)], temperature=0, max_retries=0)
    assert isinstance(made, Add) and answer.usage.completion_tokens > 3


check.cannot("parallel tools", "its mode for several calls leaves the choice to the model, and the demo makes none")


@check("nested tools")
def _() -> None:
    assert isinstance(ask(tools, Trip, user(SUM)), Trip)


@check("structured")
def _() -> None:
    for model in (Add, Trip):
        assert isinstance(ask(schema, model, user(SUM)), model)


@check("errors")
def _() -> None:
    for options in ({"model": "other"}, {"presence_penalty": 99}):
        raised(InstructorRetryException, ask, tools, Add, user(SUM), **options)


@check("history")
def _() -> None:
    seen, said = user(Image.from_path(PICTURE), SEE), {"role": "assistant", "content": SEE_ANSWER}
    assert text_of(seen, said, user(COUNT)) == COUNT_ANSWER
    _, answer = tools.create_with_completion(response_model=Add, messages=[user(SUM)], temperature=0, max_retries=0)
    called = answer.choices[0].message.model_dump()
    result = {"role": "tool", "tool_call_id": called["tool_calls"][0]["id"], "content": "7"}
    assert isinstance(ask(tools, Add, user(SUM), called, result, user(SUM)), Add)
