"""POST /v1/messages: Anthropic's API, for text, images and tools."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import ConfigDict, Field

from gemma3n_onnx.runtime.errors import Gemma3nError, PromptError, no_document
from gemma3n_onnx.runtime.generation.scheduler import TokenEvent
from gemma3n_onnx.runtime.serve.answering import AnswerEvent, Choice
from gemma3n_onnx.runtime.serve.errors import anthropic_body, status_and_body
from gemma3n_onnx.runtime.serve.openai.chat import ChatRequest, ParsedChat, read_chat
from gemma3n_onnx.runtime.serve.openai.completion import usage
from gemma3n_onnx.runtime.serve.openai.outcome import Outcome, TextHolder, outcome_of
from gemma3n_onnx.runtime.serve.openai.requests import (
    MAX_TOOLS,
    ApiModel,
    ApiRequest,
    Items,
    Messages,
    StopStrings,
)
from gemma3n_onnx.runtime.serve.openai.responses import TextFormat
from gemma3n_onnx.runtime.serve.service import NamedEvents, Service

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class OutputConfig(ApiModel):
    model_config = ConfigDict(extra="ignore")

    format: TextFormat | None = None


class MessagesRequest(ApiRequest):
    messages: Annotated[Messages, Field(min_length=1)]
    max_tokens: int | None = None
    system: str | Messages | None = None
    stream: bool = False
    stop_sequences: StopStrings = Field(default_factory=list)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: Annotated[Items[dict[str, Any]], Field(max_length=MAX_TOOLS)] = Field(default_factory=list)
    tool_choice: dict[str, Any] | None = None
    output_config: OutputConfig = Field(default_factory=OutputConfig)


def add_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/messages")
    async def messages(request: MessagesRequest, http: HttpRequest) -> Response:
        async with service.held(request.model) as served:
            parsed = await service.read(read_chat, _chat_request(request), served, http)
            if request.stream:
                return service.stream(parsed, served, MessageEvents(parsed, served.name), http)
            (choice,) = await service.answer(parsed, served, http)
        outcome = outcome_of(choice, parsed.tools)
        message = _message(served.name, _blocks(outcome), _stop(choice, outcome), _usage(choice, parsed))
        return JSONResponse(message | parsed.warnings)

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(request: MessagesRequest, http: HttpRequest) -> dict[str, int]:
        async with service.held(request.model) as served:
            parsed = await service.read(read_chat, _chat_request(request), served, http)
        return {"input_tokens": len(parsed.prompts[0])}


def _chat_request(request: MessagesRequest) -> ChatRequest:
    messages = [message for each in enumerate(request.messages) for message in _messages_of(*each)]
    if request.system is not None:
        messages.insert(0, {"role": "system", "content": request.system})
    choice = request.tool_choice or {}
    named = {"function": {"name": choice.get("name")}}
    fields: dict[str, Any] = {
        "model": request.model,
        "messages": messages,
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "stop": request.stop_sequences,
        "tools": [_tool(tool) for tool in request.tools],
        "tool_choice": TOOL_CHOICES.get(str(choice.get("type", "auto")), named),
        "parallel_tool_calls": choice.get("disable_parallel_tool_use") is False,
    }
    if (wanted := request.output_config.format) is not None:
        fields["response_format"] = {"type": wanted.type, "schema": wanted.schema_}
    return ChatRequest.model_validate(fields)


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    if "input_schema" not in tool:
        raise PromptError(
            f"The tool {tool.get('name')!r} has no input_schema; tools that run on a server are not offered."
        )
    function = {"name": tool.get("name"), "description": tool.get("description"), "parameters": tool["input_schema"]}
    return {"type": "function", "function": function}


def _messages_of(place: int, message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A message as messages of chat completions: results first, then the rest."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(content, list):
        yield {"role": role, "content": content}
        return
    if not all(isinstance(block, dict) for block in content):
        raise PromptError(f"The content of message {place} must be text or a list of blocks.")
    blocks = [block for block in content if block.get("type") not in ("thinking", "redacted_thinking")]
    calls = [
        {"id": block.get("id"), "function": {"name": block.get("name"), "arguments": block.get("input")}}
        for block in blocks
        if block.get("type") == "tool_use"
    ]
    for block in blocks:
        if block.get("type") == "tool_result":
            result = block.get("content")
            parts = [_part(each, place) for each in result] if isinstance(result, list) else result
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": parts}
    rest = [_part(block, place) for block in blocks if block.get("type") not in ("tool_use", "tool_result")]
    if calls:
        yield {"role": role, "content": rest, "tool_calls": calls}
    elif rest:
        yield {"role": role, "content": rest}


def _part(block: Any, place: int) -> dict[str, Any]:
    match block:
        case {"type": "text", "text": text}:
            return {"type": "text", "text": text}
        case {"type": "image", "source": {"type": "base64", "data": data}}:
            return {"type": "image", "base64": data}
        case {"type": "image", "source": {"type": "url", "url": url}}:
            return {"type": "image", "url": url}
    if _type_of(block) == "document":
        raise no_document(f"Message {place} has a block of type 'document'")
    raise PromptError(
        f"Message {place} has an unsupported block of type {_type_of(block)!r}; send text, images (base64 or url), "
        "tool_use and tool_result."
    )


def _type_of(block: Any) -> Any:
    return block.get("type") if isinstance(block, Mapping) else type(block).__name__


def _blocks(outcome: Outcome) -> list[dict[str, Any]]:
    calls = [_call_block(call, _parsed_arguments(call)) for call in outcome.calls]
    return calls if outcome.text is None else [{"type": "text", "text": outcome.text}]


def _parsed_arguments(call: Mapping[str, Any]) -> Any:
    """Arguments as an object; of a call that was cut off, none."""
    try:
        return json.loads(call["function"]["arguments"])
    except ValueError:
        return {}


def _call_block(call: Mapping[str, Any], arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{call['id'][5:]}", "name": call["function"]["name"], "input": arguments}


def _stop(choice: Choice, outcome: Outcome) -> tuple[str, str | None]:
    """stop_reason and stop_sequence."""
    assert choice.end is not None
    if outcome.finish == "stop" and choice.end.stop_string is not None:
        return "stop_sequence", choice.end.stop_string
    return STOP_REASONS[outcome.finish], None


def _usage(choice: Choice, parsed: ParsedChat) -> dict[str, int]:
    counted = usage([choice], parsed)
    cached = counted["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": counted["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": counted["completion_tokens"],
    }


def _message(
    model: str, content: Sequence[Mapping[str, Any]], stop: tuple[str | None, str | None], used: Mapping[str, int]
) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": list(content),
        "stop_reason": stop[0],
        "stop_sequence": stop[1],
        "usage": used,
    }


class AnthropicEvents(NamedEvents):
    def error(self, error: Gemma3nError) -> str:
        return self.event(anthropic_body(status_and_body(error)[1]))


class MessageEvents:
    """A `StreamFormat`: the events of one message."""

    sse = AnthropicEvents()

    def __init__(self, parsed: ParsedChat, model: str) -> None:
        self._parsed, self._model = parsed, model
        self._choice, self._holder = Choice(), TextHolder(parsed.tools)
        self._begun = False

    def first(self) -> list[dict[str, Any]]:
        used = {"input_tokens": len(self._parsed.prompts[0]), "output_tokens": 0}
        message = _message(self._model, [], (None, None), used)
        return [{"type": "message_start", "message": message | self._parsed.warnings}]

    def next(self, index: int, event: AnswerEvent) -> list[dict[str, Any]]:
        self._choice.add(event)
        if isinstance(event, TokenEvent):
            return [*self._text(self._holder.release(self._choice))]
        outcome = outcome_of(self._choice, self._parsed.tools)
        if outcome.text is None:
            events = [event for place, call in enumerate(outcome.calls) for event in _call_events(place, call)]
        else:
            events = [
                *self._text(self._holder.rest(self._choice), last=True),
                {"type": "content_block_stop", "index": 0},
            ]
        reason, sequence = _stop(self._choice, outcome)
        ended = {"stop_reason": reason, "stop_sequence": sequence}
        used = _usage(self._choice, self._parsed)
        return [*events, {"type": "message_delta", "delta": ended, "usage": used}, {"type": "message_stop"}]

    def last(self) -> list[dict[str, Any]]:
        return []

    def _text(self, pieces: slice, last: bool = False) -> Iterator[dict[str, Any]]:
        text = "".join(self._choice.pieces[pieces])
        if not self._begun and (text or last):
            self._begun = True
            yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        if text:
            yield {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}


def _call_events(place: int, call: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    arguments = {"type": "input_json_delta", "partial_json": call["function"]["arguments"]}
    yield {"type": "content_block_start", "index": place, "content_block": _call_block(call, {})}
    yield {"type": "content_block_delta", "index": place, "delta": arguments}
    yield {"type": "content_block_stop", "index": place}
