"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import BeforeValidator, Field

from gemma3n_onnx.runtime.errors import OptionError
from gemma3n_onnx.runtime.generation.logprobs import TokenLogprob
from gemma3n_onnx.runtime.generation.scheduler import FinishEvent
from gemma3n_onnx.runtime.media.reader import MediaOptions
from gemma3n_onnx.runtime.prompt.encoder import TemplateOptions
from gemma3n_onnx.runtime.prompt.messages import sources_of, without_media
from gemma3n_onnx.runtime.serve.answering import AnswerEvent, Choice, ParsedRequest
from gemma3n_onnx.runtime.serve.errors import name_max_tokens
from gemma3n_onnx.runtime.serve.model_pool import Served
from gemma3n_onnx.runtime.serve.service import Service

from . import tools
from .completion import CompletionKind, StreamChunks, complete, listed_logprobs
from .outcome import TextHolder, outcome_of
from .requests import MAX_TOOLS, Items, Messages, generation_options, require_room
from .response_format import ConstrainedRequest, constraint_of
from .tools import NO_TOOLS, CallableTools, Function, Tool


def _any_number(value: Any) -> Any:
    """Together's `logprobs` is a number."""
    return value > 0 if type(value) is int else value


class ChatRequest(ConstrainedRequest):
    messages: Annotated[Messages, Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: Annotated[bool | None, BeforeValidator(_any_number)] = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    tools: Annotated[Items[Tool], Field(max_length=MAX_TOOLS)] = Field(default_factory=list)
    tool_choice: Any = None
    parallel_tool_calls: bool = False
    # The fields that preceded tools.
    functions: Annotated[Items[Function], Field(max_length=MAX_TOOLS)] = Field(default_factory=list)
    function_call: Any = None
    # Chat template options, named as in vLLM.
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    # Media options.
    image_size: int | None = None
    long_audio: str = "error"
    video_fps: float = 1.0
    max_frames: int = 16

    @property
    def has_media(self) -> bool:
        return bool(sources_of(self.messages))


@dataclass(frozen=True)
class ParsedChat(ParsedRequest):
    """`legacy`: calls are answered as `function_call`."""

    tools: CallableTools = NO_TOOLS
    legacy: bool = False


def add_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest, http: HttpRequest) -> Response:
        if request.max_completion_tokens is not None:
            name_max_tokens(http, "max_completion_tokens")
        return await complete(CHAT, request, service, http)


def read_chat(request: ChatRequest, served: Served) -> ParsedChat:
    """Reads media and tokenizes.

    Raises:
        Gemma3nError: what is wrong with the request.
    """
    legacy = bool(request.functions) and not request.tools
    given = [Tool(function=function) for function in request.functions] if legacy else request.tools
    choice = request.function_call if legacy else request.tool_choice
    callable_tools = tools.select_tools(given, choice, request.parallel_tool_calls)
    described = [tool.model_dump() for tool in callable_tools.tools]
    require_room(served, without_media(request.messages), described, request.chat_template_kwargs)
    media = MediaOptions(
        image_size=request.image_size,
        long_audio=request.long_audio,  # type: ignore[arg-type]
        video_fps=request.video_fps,
        max_frames=request.max_frames,
    )
    native = served.model.template is not None and served.model.template.reads_tools
    if native:
        messages = tools.to_template_messages(request.messages)
    else:
        messages = tools.to_plain_messages(request.messages, callable_tools.tools)
    template = TemplateOptions(
        add_generation_prompt=request.add_generation_prompt is not False,
        continue_final_message=_continues(request),
        tools=[tool | {"type": "function"} for tool in described] if native else None,
        variables=request.chat_template_kwargs,
        control_tokens=served.options.control_tokens,
    )
    prompt = served.model.encode(messages, media, template)
    if request.top_logprobs and not request.logprobs:
        raise OptionError("top_logprobs needs logprobs to be true.")
    logprobs = request.top_logprobs if request.logprobs else None
    wanted = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    options = generation_options(request, served, [prompt], wanted, logprobs)
    parsed = ParsedChat([prompt], options, request.n, tools=callable_tools, legacy=legacy)
    if callable_tools.forced:
        schema = tools.schema_of(callable_tools.tools, parallel=callable_tools.parallel)
        return replace(parsed, constrain=partial(served.grammars.json_of, schema))
    constrain = constraint_of(request, served.grammars)
    if constrain is not None:
        return replace(parsed, constrain=constrain, tools=NO_TOOLS)  # a constrained answer is not a tool call
    return parsed


def _continues(request: ChatRequest) -> bool:
    """Whether the answer continues the last message: by default where it is the assistant's."""
    if request.continue_final_message is not None:
        return request.continue_final_message
    last = request.messages[-1]
    return (
        last.get("role") in ("assistant", "model") and not last.get("tool_calls") and not request.add_generation_prompt
    )


def chat_choice(index: int, choice: Choice, parsed: ParsedChat, served: Served) -> dict[str, Any]:
    answer = outcome_of(choice, parsed.tools)
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    finish = answer.finish
    if answer.calls and parsed.legacy:
        message["function_call"] = answer.calls[0]["function"]
        finish = "function_call" if finish == "tool_calls" else finish
    elif answer.calls:
        message["tool_calls"] = list(answer.calls)
    return {
        "index": index,
        "message": message,
        "logprobs": None if parsed.options.logprobs is None else _logprobs(choice.logprobs, served),
        "finish_reason": finish,
    }


def _logprobs(tokens: Sequence[TokenLogprob], served: Served) -> dict[str, Any]:
    return {"content": listed_logprobs(tokens, served), "refusal": None}


class ChatChunks(StreamChunks[ParsedChat]):
    object, prefix = "chat.completion.chunk", "chatcmpl"

    def __init__(self, parsed: ParsedChat, served: Served, *, with_usage: bool) -> None:
        super().__init__(parsed, served, with_usage=with_usage)
        self._holders = [TextHolder(parsed.tools) for _ in self._choices]

    def first(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(_delta(index, delta)) | self._parsed.warnings for index in range(len(self._choices))]

    def _parts(self, index: int, event: AnswerEvent) -> list[dict[str, Any]]:
        choice = self._choices[index]
        if isinstance(event, FinishEvent):
            return self._end(index, choice)
        return self._text(index, choice, self._holders[index].release(choice))

    def _text(self, index: int, choice: Choice, pieces: slice) -> list[dict[str, Any]]:
        text, found = "".join(choice.pieces[pieces]), choice.logprobs[pieces]
        if not text and not found:
            return []
        return [_delta(index, {"content": text}, logprobs=_logprobs(found, self._served) if found else None)]

    def _end(self, index: int, choice: Choice) -> list[dict[str, Any]]:
        whole = chat_choice(index, choice, self._parsed, self._served)
        deltas: list[dict[str, Any]] = []
        if call := whole["message"].get("function_call"):
            deltas.append(_delta(index, {"function_call": call}))
        for number, call in enumerate(whole["message"].get("tool_calls", ())):
            # The name first, then the arguments: client libraries join the pieces.
            head = {"index": number, **call, "function": {"name": call["function"]["name"], "arguments": ""}}
            rest = {"index": number, "function": {"arguments": call["function"]["arguments"]}}
            deltas += [_delta(index, {"tool_calls": [part]}) for part in (head, rest)]
        if not deltas and whole["message"]["content"] is not None:
            deltas = self._text(index, choice, self._holders[index].rest(choice))
        return [*deltas, _delta(index, {}, finish=whole["finish_reason"])]


def _delta(index: int, delta: Mapping[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


CHAT = CompletionKind("chat.completion", "chatcmpl", read_chat, chat_choice, ChatChunks)
