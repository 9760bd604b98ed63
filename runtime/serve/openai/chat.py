"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import BaseModel, Field

from gemma3n_onnx.runtime.errors import OptionError
from gemma3n_onnx.runtime.generation.logits_processors import LogitsProcessor
from gemma3n_onnx.runtime.generation.logprobs import TokenLogprob
from gemma3n_onnx.runtime.generation.scheduler import FinishEvent, TokenEvent
from gemma3n_onnx.runtime.media.reader import MediaOptions
from gemma3n_onnx.runtime.serve.answering import Choice, ParsedRequest
from gemma3n_onnx.runtime.serve.grammar import ANY_OBJECT
from gemma3n_onnx.runtime.serve.model_pool import Served
from gemma3n_onnx.runtime.serve.service import Service

from . import tools
from .completion import CompletionKind, StreamChunks, complete, token_text
from .requests import SamplingRequest, generation_options
from .tools import NamedTool, Tool


class JsonSchema(BaseModel):
    """`schema` of the request is `schema_` here, which pydantic keeps for itself."""

    name: str = ""
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(SamplingRequest):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    image_size: int | None = None
    long_audio: str = "error"
    video_fps: float = 1.0
    max_frames: int = 16


@dataclass(frozen=True)
class ParsedChat(ParsedRequest):
    """`tools`: those that the model may call."""

    tools: list[Tool] = field(default_factory=list)


def add_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest, http: HttpRequest) -> Response:
        return await complete(CHAT, request, service, http)


def read_chat(request: ChatRequest, served: Served) -> ParsedChat:
    """Reads media and tokenizes.

    Raises:
        Gemma3nError: what is wrong with the request.
    """
    may_call = tools.select_tools(request.tools, request.tool_choice)
    messages = tools.to_plain_messages(request.messages, may_call)
    media = MediaOptions(
        image_size=request.image_size,
        long_audio=request.long_audio,  # type: ignore[arg-type]
        video_fps=request.video_fps,
        max_frames=request.max_frames,
    )
    prompt = served.model.encode(messages, media)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    if request.top_logprobs is not None and not request.logprobs:
        raise OptionError("top_logprobs needs logprobs to be true.")
    wanted = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    options = generation_options(request, served, [prompt], wanted, logprobs)
    if (processor := _grammar(request, may_call, served)) is not None:
        options = replace(options, logits_processor=processor)
    return ParsedChat([prompt], options, request.n, may_call)


def _grammar(request: ChatRequest, may_call: Sequence[Tool], served: Served) -> Callable[[], LogitsProcessor] | None:
    wanted = request.response_format
    if may_call and request.tool_choice != "auto":
        if wanted is not None and wanted.type != "text":
            raise OptionError(
                "response_format cannot be combined with a forced tool call; remove it, or set tool_choice to 'none'."
            )
        return served.grammars.json_of(tools.schema_of(may_call)).processor
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return served.grammars.json_of(ANY_OBJECT).processor
    if wanted.json_schema is None:
        raise OptionError("response_format of type json_schema needs the field json_schema; add it.")
    return served.grammars.json_of(wanted.json_schema.schema_).processor


def chat_choice(index: int, choice: Choice, parsed: ParsedChat, served: Served) -> dict[str, Any]:
    assert choice.end is not None
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    finish = choice.end.reason
    if parsed.tools and finish == "stop" and (calls := tools.parse_tool_calls(choice.text, parsed.tools)):
        message |= {"content": None, "tool_calls": calls}
        finish = "tool_calls"
    return {
        "index": index,
        "message": message,
        "logprobs": None if parsed.options.logprobs is None else _logprobs(choice.logprobs, served),
        "finish_reason": finish,
    }


def _logprobs(tokens: Sequence[TokenLogprob], served: Served) -> dict[str, Any]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = token_text(token_id, served)
        return {"token": text, "logprob": logprob, "bytes": [*text.encode()]}

    listed = [
        {**entry(token.token_id, token.logprob), "top_logprobs": [entry(*likely) for likely in token.top]}
        for token in tokens
    ]
    return {"content": listed, "refusal": None}


class ChatChunks(StreamChunks[ParsedChat]):
    """Holds text back while it may still be a tool call."""

    object, prefix = "chat.completion.chunk", "chatcmpl"

    def __init__(self, parsed: ParsedChat, served: Served, *, with_usage: bool) -> None:
        super().__init__(parsed, served, with_usage=with_usage)
        self._sent = [0] * len(self._choices)
        self._holds = [bool(parsed.tools)] * len(self._choices)

    def first(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(_delta(index, delta)) for index in range(len(self._choices))]

    def _parts(self, index: int, event: TokenEvent | FinishEvent) -> list[dict[str, Any]]:
        choice = self._choices[index]
        if isinstance(event, FinishEvent):
            return self._end(index, choice)
        self._holds[index] = self._holds[index] and tools.may_be_tool_calls(choice.text)
        return [] if self._holds[index] else self._text(index, choice)

    def _text(self, index: int, choice: Choice) -> list[dict[str, Any]]:
        """Text that has not been sent yet."""
        sent, self._sent[index] = self._sent[index], len(choice.pieces)
        text, found = "".join(choice.pieces[sent:]), choice.logprobs[sent:]
        if not text and not found:
            return []
        return [_delta(index, {"content": text}, logprobs=_logprobs(found, self._served) if found else None)]

    def _end(self, index: int, choice: Choice) -> list[dict[str, Any]]:
        whole = chat_choice(index, choice, self._parsed, self._served)
        calls = whole["message"].get("tool_calls")
        if calls:
            deltas = [_delta(index, {"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]})]
        else:
            deltas = self._text(index, choice)
        return [*deltas, _delta(index, {}, finish=whole["finish_reason"])]


def _delta(index: int, delta: Mapping[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


CHAT = CompletionKind("chat.completion", "chatcmpl", read_chat, chat_choice, ChatChunks)
