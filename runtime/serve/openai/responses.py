"""POST /v1/responses, and the responses that are kept for `previous_response_id`."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import ConfigDict, Field

from gemma3n_onnx.runtime.errors import Gemma3nError, OptionError, PromptError
from gemma3n_onnx.runtime.generation.scheduler import TokenEvent
from gemma3n_onnx.runtime.serve.answering import AnswerEvent, Choice
from gemma3n_onnx.runtime.serve.errors import name_max_tokens, status_and_body
from gemma3n_onnx.runtime.serve.model_pool import Served
from gemma3n_onnx.runtime.serve.service import NamedEvents, Service

from .chat import ChatRequest, ParsedChat, read_chat
from .completion import listed_logprobs, usage
from .outcome import Outcome, TextHolder, outcome_of
from .requests import MAX_TOOLS, ApiModel, ApiRequest, Items, Messages, StreamOptions
from .response_store import ResponseStore

LOGPROBS = "message.output_text.logprobs"


class TextFormat(ApiModel):
    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "json_object", "json_schema"]
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class TextOptions(ApiModel):
    model_config = ConfigDict(extra="ignore")

    format: TextFormat | None = None


class ResponsesRequest(ApiRequest):
    """`store` keeps the response, so that a later request can name it; other fields as of chat completions."""

    input: str | Messages
    instructions: str | None = None
    previous_response_id: str | None = None
    stream: bool = False
    store: bool = True
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: TextOptions = Field(default_factory=TextOptions)
    tools: Annotated[Items[dict[str, Any]], Field(max_length=MAX_TOOLS)] = Field(default_factory=list)
    tool_choice: Any = None
    parallel_tool_calls: bool = False
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False
    stream_options: StreamOptions | None = None
    include: Items[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = Field(default_factory=list)
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    metadata: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Conversation:
    """`items` of the input, resolved; `messages` the same in the form of chat completions."""

    items: list[dict[str, Any]]
    messages: list[dict[str, Any]]


def add_routes(app: FastAPI, service: Service) -> None:
    store = ResponseStore()

    @app.post("/v1/responses")
    async def responses(request: ResponsesRequest, http: HttpRequest) -> Response:
        name_max_tokens(http, "max_output_tokens")
        conversation = _conversation(request, store)
        async with service.held(request.model) as served:
            parsed = await service.read(read_chat, _chat_request(request, conversation), served, http)
            answer = ResponseBuilder(request, served, parsed)
            if request.stream:
                return service.stream(parsed, served, ResponseEvents(answer, conversation, store), http)
            (choice,) = await service.answer(parsed, served, http)
        whole = answer.finished(choice)
        answer.keep(store, conversation, whole)
        return JSONResponse(whole)

    @app.get("/v1/responses/{response_id}")
    async def response(response_id: str, stream: bool = False) -> Response:
        if stream:
            raise OptionError("A stored response is not streamed again; leave out stream.")
        return JSONResponse(store.response(response_id))

    @app.delete("/v1/responses/{response_id}")
    async def delete(response_id: str) -> dict[str, Any]:
        store.delete(response_id)
        return {"id": response_id, "object": "response", "deleted": True}


def _conversation(request: ResponsesRequest, store: ResponseStore) -> Conversation:
    """Raises UnknownResponseError and PromptError."""
    given = request.input
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if request.previous_response_id is not None:
        items = [*store.conversation(request.previous_response_id), *items]
    items = [store.item(str(item.get("id"))) if item.get("type") == "item_reference" else item for item in items]
    messages = [*_messages_of(items)]
    if request.instructions:
        messages.insert(0, {"role": "system", "content": request.instructions})
    return Conversation(items, messages)


def _messages_of(items: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Items as messages of chat completions; consecutive calls become one message."""
    groups = itertools.groupby(enumerate(items), lambda placed: placed[1].get("type") == "function_call")
    for are_calls, group in groups:
        if are_calls:
            yield {"role": "assistant", "content": "", "tool_calls": [_tool_call(item) for _, item in group]}
            continue
        for place, item in group:
            match kind := item.get("type", "message"):
                case "message":
                    yield {"role": item.get("role"), "content": item.get("content")}
                case "function_call_output":
                    yield {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
                case "reasoning":
                    continue
                case _:
                    raise PromptError(
                        f"Item {place} of the input has type {kind!r}; supported are message, function_call, "
                        "function_call_output and item_reference."
                    )


def _tool_call(item: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    return {"id": item.get("call_id"), "type": "function", "function": function}


def _chat_request(request: ResponsesRequest, conversation: Conversation) -> ChatRequest:
    fields: dict[str, Any] = {
        "model": request.model,
        "messages": conversation.messages,
        "max_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "tools": request.tools,
        "tool_choice": request.tool_choice,
        "parallel_tool_calls": request.parallel_tool_calls,
        "logprobs": LOGPROBS in request.include,
        "top_logprobs": request.top_logprobs,
    }
    if request.top_logprobs and LOGPROBS not in request.include:
        raise OptionError(f"top_logprobs needs {LOGPROBS!r} in include; add it.")
    if (wanted := request.text.format) is not None:
        if wanted.type == "json_schema" and wanted.schema_ is None:
            raise OptionError("text.format of type json_schema needs the field schema; add it.")
        fields["response_format"] = {"type": wanted.type, "schema": wanted.schema_}
    return ChatRequest.model_validate(fields)


class ResponseBuilder:
    """The response object in its states."""

    def __init__(self, request: ResponsesRequest, served: Served, parsed: ParsedChat) -> None:
        self.request, self.parsed, self._served = request, parsed, served
        self.id, self._created = _new_id("resp"), int(time.time())

    def whole(self, status: str, output: Sequence[Mapping[str, Any]] = (), **rest: Any) -> dict[str, Any]:
        request, options = self.request, self.parsed.options
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": self._served.name,
            "output": list(output),
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": request.store,
            "temperature": options.temperature,
            "text": {"format": _text_format(request)},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools,
            "top_logprobs": request.top_logprobs,
            "top_p": 1.0 if options.top_p is None else options.top_p,
            "truncation": request.truncation,
            "usage": None,
            "metadata": request.metadata,
            **self.parsed.warnings,
            **rest,
        }

    def finished(self, choice: Choice) -> dict[str, Any]:
        outcome = outcome_of(choice, self.parsed.tools)
        return self.ended(choice, outcome, self.items(choice, outcome))

    def items(self, choice: Choice, outcome: Outcome, message_id: str | None = None) -> list[dict[str, Any]]:
        """Output items. `message_id`: of the message item, if its text has been streamed."""
        status = _status(outcome)
        if outcome.text is not None:
            part = _text_part(outcome.text, self.logprobs(choice))
            return [_message_item(message_id or _new_id("msg"), status, [part])]
        return [_call_item(call, status, call["function"]["arguments"]) for call in outcome.calls]

    def logprobs(self, choice: Choice, pieces: slice = slice(None)) -> list[dict[str, Any]]:
        """Those of some pieces of the text; none unless they were asked for."""
        return listed_logprobs(choice.logprobs[pieces], self._served)

    def ended(self, choice: Choice, outcome: Outcome, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return self.whole(
            _status(outcome),
            items,
            incomplete_details={"reason": "max_output_tokens"} if outcome.is_cut else None,
            usage=_usage(choice, self.parsed),
        )

    def keep(self, store: ResponseStore, conversation: Conversation, response: Mapping[str, Any]) -> None:
        if self.request.store:
            store.keep(response, conversation.items)


def _text_format(request: ResponsesRequest) -> dict[str, Any]:
    wanted = request.text.format
    return {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_none=True)


def _usage(choice: Choice, parsed: ParsedChat) -> dict[str, Any]:
    counted = usage([choice], parsed)
    return {
        "input_tokens": counted["prompt_tokens"],
        "input_tokens_details": counted["prompt_tokens_details"],
        "output_tokens": counted["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counted["total_tokens"],
    }


def _status(outcome: Outcome) -> str:
    return "incomplete" if outcome.is_cut else "completed"


def _message_item(item_id: str, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": content}


def _text_part(text: str, logprobs: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": [*logprobs]}


def _call_item(call: Mapping[str, Any], status: str, arguments: str) -> dict[str, Any]:
    return {
        "id": f"fc_{call['id'].removeprefix('call_')}",
        "type": "function_call",
        "status": status,
        "call_id": call["id"],
        "name": call["function"]["name"],
        "arguments": arguments,
    }


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


class _ResponseErrors(NamedEvents):
    """An error is an event, and then the response has failed."""

    def __init__(self, events: ResponseEvents) -> None:
        self._events = events

    def error(self, error: Gemma3nError) -> str:
        told = status_and_body(error)[1]["error"]
        return "".join(map(self.event, self._events.failed(told["code"] or told["type"], told["message"])))


class ResponseEvents:
    """A `StreamFormat`: the events of one response."""

    def __init__(self, answer: ResponseBuilder, conversation: Conversation, store: ResponseStore) -> None:
        self._answer, self._conversation, self._store = answer, conversation, store
        self._choice, self._holder = Choice(), TextHolder(answer.parsed.tools)
        self._numbers = itertools.count()
        self.sse = _ResponseErrors(self)
        self._message: str | None = None
        """The id of the message item, once its text has begun."""

    def first(self) -> list[dict[str, Any]]:
        states = ("response.created", "response.in_progress")
        return [self._event(kind, response=self._answer.whole("in_progress")) for kind in states]

    def next(self, index: int, event: AnswerEvent) -> list[dict[str, Any]]:
        self._choice.add(event)
        if isinstance(event, TokenEvent):
            return [*self._text(self._holder.release(self._choice))]
        outcome = outcome_of(self._choice, self._answer.parsed.tools)
        if outcome.text is None:
            items = self._answer.items(self._choice, outcome)
            events = [event for place, item in enumerate(items) for event in self._call(place, item)]
        else:
            events = [*self._text(self._holder.rest(self._choice), last=True)]
            items = self._answer.items(self._choice, outcome, self._message)
            events += self._text_end(items[0])
        whole = self._answer.ended(self._choice, outcome, items)
        self._answer.keep(self._store, self._conversation, whole)
        return [*events, self._event(f"response.{whole['status']}", response=whole)]

    def last(self) -> list[dict[str, Any]]:
        return []

    def failed(self, code: str, message: str) -> list[dict[str, Any]]:
        told = {"code": code, "message": message}
        response = self._answer.whole("failed", error=told)
        return [self._event("error", **told, param=None), self._event("response.failed", response=response)]

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "sequence_number": next(self._numbers), **fields}

    def _text(self, pieces: slice, last: bool = False) -> Iterator[dict[str, Any]]:
        text, listed = "".join(self._choice.pieces[pieces]), self._answer.logprobs(self._choice, pieces)
        if self._message is None and (text or listed or last):
            self._message = _new_id("msg")
            item = _message_item(self._message, "in_progress", [])
            yield self._event("response.output_item.added", output_index=0, item=item)
            yield self._event("response.content_part.added", **self._place(), part=_text_part(""))
        if text or listed:
            yield self._event("response.output_text.delta", **self._place(), delta=text, logprobs=listed)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message, "output_index": 0, "content_index": 0}

    def _text_end(self, item: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        (part,) = item["content"]
        yield self._event("response.output_text.done", **self._place(), text=part["text"], logprobs=part["logprobs"])
        yield self._event("response.content_part.done", **self._place(), part=part)
        yield self._event("response.output_item.done", output_index=0, item=item)

    def _call(self, place: int, item: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        arguments, where = item["arguments"], {"item_id": item["id"], "output_index": place}
        begun = {**item, "status": "in_progress", "arguments": ""}
        yield self._event("response.output_item.added", output_index=place, item=begun)
        yield self._event("response.function_call_arguments.delta", **where, delta=arguments)
        yield self._event("response.function_call_arguments.done", **where, name=item["name"], arguments=arguments)
        yield self._event("response.output_item.done", output_index=place, item=item)
