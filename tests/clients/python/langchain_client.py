"""LangChain's ChatOpenAI."""

from __future__ import annotations

import openai
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI

from checks import (
    AUDIO,
    BASE,
    COUNT,
    COUNT_ANSWER,
    HEAR,
    HEAR_ANSWER,
    IMAGE,
    KEY,
    MODEL,
    PICTURE_BASE64,
    SEE,
    SEE_ANSWER,
    SOUND_BASE64,
    SUM,
    SUM_ANSWER,
    Checks,
    is_sum,
    is_trip,
    raised,
)
from models import Add, Trip

check = Checks("langchain-openai", "langchain-openai")
llm = ChatOpenAI(model=MODEL, base_url=BASE, api_key=KEY, temperature=0, max_retries=0)


@check("text")
def _() -> None:
    answer = llm.invoke(SUM)
    assert answer.content == SUM_ANSWER and answer.usage_metadata["output_tokens"] > 3
    assert llm.invoke([SystemMessage("Be brief."), HumanMessage(SUM)]).content


@check("stream")
def _() -> None:
    pieces = [*llm.stream(SUM, stream_usage=True)]
    assert "".join(piece.content for piece in pieces) == SUM_ANSWER and len(pieces) > 3
    assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) > 3


@check("image")
def _() -> None:
    standard = {"type": "image", "base64": PICTURE_BASE64, "mime_type": "image/png"}
    for part in (IMAGE, standard):
        assert llm.invoke([HumanMessage([part, {"type": "text", "text": SEE}])]).content == SEE_ANSWER


@check("audio")
def _() -> None:
    standard = {"type": "audio", "base64": SOUND_BASE64, "mime_type": "audio/wav"}
    for part in (standard, AUDIO):
        assert llm.invoke([HumanMessage([part, {"type": "text", "text": HEAR}])]).content == HEAR_ANSWER


@check("tools offered")
def _() -> None:
    answer = llm.bind_tools([Add]).invoke(SUM)
    assert answer.content and not answer.tool_calls


@check("tools forced")
def _() -> None:
    for choice in ("required", "any", "Add", True):
        (call,) = llm.bind_tools([Add], tool_choice=choice).invoke(SUM).tool_calls
        assert call["name"] == "Add" and is_sum(call["args"])
    pieces = [*llm.bind_tools([Add], tool_choice="any").stream(SUM)]
    (call,) = sum(pieces[1:], pieces[0]).tool_calls
    assert is_sum(call["args"])


@check("parallel tools")
def _() -> None:
    calls = llm.bind_tools([Add], tool_choice="any", parallel_tool_calls=True).invoke(SUM).tool_calls
    assert calls and all(is_sum(call["args"]) for call in calls)


@check("nested tools")
def _() -> None:
    for strict in (None, True):
        (call,) = llm.bind_tools([Trip], tool_choice="any", strict=strict).invoke(SUM).tool_calls
        assert is_trip(call["args"])


@check("structured")
def _() -> None:
    for method in ("json_schema", "function_calling"):
        assert isinstance(llm.with_structured_output(Add, method=method).invoke(SUM), Add)
    assert isinstance(llm.with_structured_output(Trip).invoke(SUM), Trip)
    *_, last = llm.with_structured_output(Add).stream(SUM)
    assert isinstance(last, Add)


@check("errors")
def _() -> None:
    wrong = {openai.NotFoundError: {"model": "other"}, openai.BadRequestError: {"temperature": -1}}
    for kind, options in wrong.items():
        model = ChatOpenAI(**{"model": MODEL, "base_url": BASE, "api_key": KEY, "max_retries": 0} | options)
        raised(kind, model.invoke, SUM)
        raised(kind, list, model.stream(SUM))


@check("history")
def _() -> None:
    seen = HumanMessage([IMAGE, {"type": "text", "text": SEE}])
    assert llm.invoke([seen, AIMessage(SEE_ANSWER), HumanMessage(COUNT)]).content == COUNT_ANSWER
    called = llm.bind_tools([Add], tool_choice="any").invoke(SUM)
    before, call = [HumanMessage(SUM), called], called.tool_calls[0]["id"]
    assert llm.bind_tools([Add]).invoke([*before, ToolMessage("7", tool_call_id=call)])
    shown = ToolMessage([IMAGE], tool_call_id=call)
    assert llm.invoke([*before, shown, HumanMessage(SEE)]).content == SEE_ANSWER
