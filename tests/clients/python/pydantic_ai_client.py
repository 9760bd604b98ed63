"""Pydantic AI's agents over chat completions."""

from __future__ import annotations

from pydantic_ai import Agent, BinaryContent, NativeOutput, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

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

check = Checks("pydantic-ai", "pydantic-ai")
provider = OpenAIProvider(base_url=BASE, api_key=KEY)
model = OpenAIChatModel(MODEL, provider=provider, settings={"temperature": 0})
plain = Agent(model)
PICTURE_PART = BinaryContent(PICTURE.read_bytes(), media_type="image/png")
SOUND_PART = BinaryContent(SOUND.read_bytes(), media_type="audio/wav")


@check("text")
def _() -> None:
    answer = plain.run_sync(SUM)
    assert answer.output == SUM_ANSWER and answer.usage.output_tokens > 3
    assert Agent(model, instructions="Be brief.").run_sync(SUM).output


@check("stream")
def _() -> None:
    answer = plain.run_stream_sync(SUM)
    assert "".join(answer.stream_text(delta=True, debounce_by=None)) == SUM_ANSWER


@check("image")
def _() -> None:
    assert plain.run_sync([PICTURE_PART, SEE]).output == SEE_ANSWER


@check("audio")
def _() -> None:
    assert plain.run_sync([SOUND_PART, HEAR]).output == HEAR_ANSWER


@check("tools offered")
def _() -> None:
    calls = []
    agent = Agent(model, tools=[calls.append])
    assert agent.run_sync(SUM).output and not calls


@check("tools forced")
def _() -> None:
    assert isinstance(Agent(model, output_type=Add).run_sync(SUM).output, Add)
    answer = Agent(model, output_type=ToolOutput(Add, name="add")).run_stream_sync(SUM)
    assert isinstance(answer.get_output(), Add)


@check("parallel tools")
def _() -> None:
    outputs = [ToolOutput(Add, name="add"), ToolOutput(Add, name="sub")]
    agent = Agent(model, output_type=outputs, model_settings={"parallel_tool_calls": True})
    assert isinstance(agent.run_sync(SUM).output, Add)


@check("nested tools")
def _() -> None:
    assert isinstance(Agent(model, output_type=Trip).run_sync(SUM).output, Trip)


@check("structured")
def _() -> None:
    for output in (Add, Trip):
        assert isinstance(Agent(model, output_type=NativeOutput(output)).run_sync(SUM).output, output)


@check("errors")
def _() -> None:
    for status, name, settings in ((404, "other", {}), (400, MODEL, {"presence_penalty": 99})):
        agent = Agent(OpenAIChatModel(name, provider=provider, settings=settings))
        assert raised(ModelHTTPError, agent.run_sync, SUM).status_code == status


@check("history")
def _() -> None:
    seen = plain.run_sync([PICTURE_PART, SEE])
    assert plain.run_sync(COUNT, message_history=seen.all_messages()).output == COUNT_ANSWER
    called = Agent(model, output_type=Add).run_sync(SUM)
    assert plain.run_sync([PICTURE_PART, SEE], message_history=called.all_messages()).output == SEE_ANSWER
