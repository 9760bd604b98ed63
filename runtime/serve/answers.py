"""From OpenAI's requests to sequences, and from their events to OpenAI's objects."""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from gemma3n_onnx.runtime.errors import Gemma3nError, OptionError
from gemma3n_onnx.runtime.generation.logits_processors import LogitsProcessor
from gemma3n_onnx.runtime.generation.logprobs import TokenLogprob
from gemma3n_onnx.runtime.generation.options import GenerationOptions
from gemma3n_onnx.runtime.generation.scheduler import Event, FailureEvent, FinishEvent, Request, TokenEvent
from gemma3n_onnx.runtime.media.reader import MediaOptions
from gemma3n_onnx.runtime.tokens import PromptTokens

from . import tools
from .grammar import ANY_OBJECT
from .model_pool import Served
from .protocol import ChatRequest, CompletionRequest, Sampling, Tool
from .worker import to_gemma3n_error


@dataclass(frozen=True)
class Work:
    """A parsed request: each of its prompts is answered `n` times."""

    prompts: list[PromptTokens]
    options: GenerationOptions
    n: int
    tools: list[Tool] = field(default_factory=list)


def read_chat(request: ChatRequest, served: Served) -> Work:
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
    options = _options(request, served, [prompt], wanted, logprobs)
    if (processor := _grammar(request, may_call, served)) is not None:
        options = replace(options, logits_processor=processor)
    return Work([prompt], options, request.n, may_call)


def read_completion(request: CompletionRequest, served: Served) -> Work:
    """Errors as of `read_chat`."""
    given = request.prompt
    several = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
    prompts = [served.model.encode(prompt) for prompt in (given if several else [given])]
    return Work(prompts, _options(request, served, prompts, request.max_tokens, request.logprobs), request.n)


def _options(
    request: Sampling, served: Served, prompts: Sequence[PromptTokens], max_tokens: int | None, logprobs: int | None
) -> GenerationOptions:
    """`max_tokens` None allows as many tokens as fit into the context."""
    largest = served.model.manifest.vocab_size - 1
    if request.logit_bias and max(request.logit_bias) > largest:
        raise OptionError(f"logit_bias names the token {max(request.logit_bias)}; the largest id is {largest}.")
    room = served.worker.context - max(map(len, prompts))
    stop = request.stop if request.stop is not None else ()
    return GenerationOptions(
        max_new_tokens=max(room, 1) if max_tokens is None else max_tokens,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        seed=request.seed,
        logprobs=logprobs,
        logit_bias=request.logit_bias,
    )


def _grammar(request: ChatRequest, may_call: Sequence[Tool], served: Served) -> Callable[[], LogitsProcessor] | None:
    wanted = request.response_format
    if may_call and request.tool_choice != "auto":
        if wanted is not None and wanted.type != "text":
            raise OptionError("A call is JSON of its own; leave response_format out, or set tool_choice to 'none'.")
        return served.grammars.json_of(tools.schema_of(may_call))
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return served.grammars.json_of(ANY_OBJECT)
    if wanted.json_schema is None:
        raise OptionError("response_format is json_schema and holds no json_schema; give one.")
    return served.grammars.json_of(wanted.json_schema.schema_)


class Answering:
    """The sequences of one HTTP request; their events reach the event loop that made it."""

    def __init__(self, work: Work, served: Served, deadline: float, on_first_token: Callable[[float], None]) -> None:
        """`on_first_token` is given the seconds from submission to each sequence's first token.

        Raises BusyError and ContextLengthError, as `ModelWorker.submit`.
        """
        loop = asyncio.get_running_loop()
        self._on_first_token = on_first_token
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

        def put(index: int, event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        self.requests = [
            Request(prompt, work.options, partial(put, index), sample=index % work.n, deadline=deadline)
            for index, prompt in enumerate(prompt for prompt in work.prompts for _ in range(work.n))
        ]
        served.worker.submit(self.requests)

    def __len__(self) -> int:
        return len(self.requests)

    async def events(self) -> AsyncIterator[tuple[int, TokenEvent | FinishEvent]]:
        """With the index of the choice, in order of time; ends when all choices have. Raises the first failure as a
        Gemma3nError."""
        unfinished = len(self.requests)
        started: set[int] = set()
        while unfinished:
            index, event = await self._events.get()
            if isinstance(event, FailureEvent):
                raise to_gemma3n_error(event.error)
            if index not in started:
                started.add(index)
                self._on_first_token(self.requests[index].timings.time_to_first_token)
            yield index, event
            unfinished -= isinstance(event, FinishEvent)

    def cancel(self) -> None:
        for request in self.requests:
            request.cancel()


@dataclass
class Choice:
    """One choice of a response, accumulated from its events."""

    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    end: FinishEvent | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def take(self, event: TokenEvent | FinishEvent) -> None:
        if isinstance(event, FinishEvent):
            self.end = event
            return
        self.pieces.append(event.text)
        if event.logprob is not None:
            self.logprobs.append(event.logprob)


async def collect(answering: Answering) -> list[Choice]:
    choices = [Choice() for _ in range(len(answering))]
    async for index, event in answering.events():
        choices[index].take(event)
    return choices


def usage(choices: Sequence[Choice], n: int) -> dict[str, Any]:
    """A prompt counts once for its `n` answers."""
    ends = [choice.end for choice in choices if choice.end is not None]
    prompt, made = sum(end.prompt_tokens for end in ends[::n]), sum(end.new_tokens for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in ends[::n])},
    }


def envelope(kind: str, prefix: str, model: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def chat_choice(index: int, choice: Choice, work: Work, served: Served) -> dict[str, Any]:
    assert choice.end is not None
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    finish = choice.end.reason
    if work.tools and finish == "stop" and (calls := tools.parse_tool_calls(choice.text, work.tools)):
        message |= {"content": None, "tool_calls": calls}
        finish = "tool_calls"
    logprobs = {"content": [chat_logprob(token, served) for token in choice.logprobs], "refusal": None}
    return {
        "index": index,
        "message": message,
        "logprobs": None if work.options.logprobs is None else logprobs,
        "finish_reason": finish,
    }


def chat_logprob(chosen: TokenLogprob, served: Served) -> dict[str, Any]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        token = served.model.tokenizer.decode([token_id], skip_special=False)
        return {"token": token, "logprob": logprob, "bytes": [*token.encode()]}

    return {**entry(chosen.token_id, chosen.logprob), "top_logprobs": [entry(*likely) for likely in chosen.top]}


def completion_choice(index: int, choice: Choice, work: Work, served: Served) -> dict[str, Any]:
    finish = None if choice.end is None else choice.end.reason
    logprobs = None if work.options.logprobs is None else completion_logprobs(choice.logprobs, served)
    return {"index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": finish}


def completion_logprobs(found: Sequence[TokenLogprob], served: Served) -> dict[str, Any]:
    def text(token_id: int) -> str:
        return served.model.tokenizer.decode([token_id], skip_special=False)

    tokens = [text(token.token_id) for token in found]
    offsets = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    return {
        "tokens": tokens,
        "token_logprobs": [token.logprob for token in found],
        "top_logprobs": [{text(token_id): logprob for token_id, logprob in token.top} for token in found],
        "text_offset": offsets,
    }


class StreamChunks(ABC):
    """The chunks of a streamed answer: `first`, then `next` for each event, then `usage`."""

    object: str
    prefix: str

    def __init__(self, work: Work, served: Served, *, with_usage: bool) -> None:
        self._work, self._served, self._with_usage = work, served, with_usage
        self._head = envelope(self.object, self.prefix, served.name)
        self._choices = [Choice() for _ in range(len(work.prompts) * work.n)]

    def first(self) -> list[dict[str, Any]]:
        return []

    def next(self, index: int, event: TokenEvent | FinishEvent) -> list[dict[str, Any]]:
        self._choices[index].take(event)
        return [self._whole(choice) for choice in self._parts(index, event)]

    def usage(self) -> list[dict[str, Any]]:
        if not self._with_usage:
            return []
        return [{**self._head, "choices": [], "usage": usage(self._choices, self._work.n)}]

    def _whole(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        chunk: dict[str, Any] = {**self._head, "choices": [choice]}
        return {**chunk, "usage": None} if self._with_usage else chunk

    @abstractmethod
    def _parts(self, index: int, event: TokenEvent | FinishEvent) -> list[dict[str, Any]]:
        """Chunk choices to send after an event."""


class ChatChunks(StreamChunks):
    """Holds text back while it may still be a tool call."""

    object, prefix = "chat.completion.chunk", "chatcmpl"

    def __init__(self, work: Work, served: Served, *, with_usage: bool) -> None:
        super().__init__(work, served, with_usage=with_usage)
        self._told = [0] * len(self._choices)
        self._holds = [bool(work.tools)] * len(self._choices)

    def first(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [self._whole(_delta(index, delta)) for index in range(len(self._choices))]

    def _parts(self, index: int, event: TokenEvent | FinishEvent) -> list[dict[str, Any]]:
        choice = self._choices[index]
        if isinstance(event, FinishEvent):
            return self._last(index, choice)
        self._holds[index] = self._holds[index] and tools.may_be_tool_calls(choice.text)
        return [] if self._holds[index] else self._text(index, choice)

    def _text(self, index: int, choice: Choice) -> list[dict[str, Any]]:
        """Text that has not been sent yet."""
        told, self._told[index] = self._told[index], len(choice.pieces)
        text = "".join(choice.pieces[told:])
        found = choice.logprobs[told:]
        if not text and not found:
            return []
        logprobs = (
            {"content": [chat_logprob(token, self._served) for token in found], "refusal": None} if found else None
        )
        return [_delta(index, {"content": text}, logprobs=logprobs)]

    def _last(self, index: int, choice: Choice) -> list[dict[str, Any]]:
        whole = chat_choice(index, choice, self._work, self._served)
        calls = whole["message"].get("tool_calls")
        if calls:
            deltas = [_delta(index, {"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]})]
        else:
            deltas = self._text(index, choice)
        return [*deltas, _delta(index, {}, finish=whole["finish_reason"])]


def _delta(index: int, delta: Mapping[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


class CompletionChunks(StreamChunks):
    object, prefix = "text_completion", "cmpl"

    def _parts(self, index: int, event: TokenEvent | FinishEvent) -> list[dict[str, Any]]:
        if isinstance(event, TokenEvent) and not event.text and event.logprob is None:
            return []
        now = Choice()
        now.take(event)
        return [completion_choice(index, now, self._work, self._served)]


@dataclass(frozen=True)
class Kind:
    """One of the API's two kinds of answer."""

    object: str
    prefix: str
    read: Callable[[Any, Served], Work]
    choice: Callable[[int, Choice, Work, Served], dict[str, Any]]
    stream: type[StreamChunks]


CHAT = Kind("chat.completion", "chatcmpl", read_chat, chat_choice, ChatChunks)
COMPLETION = Kind("text_completion", "cmpl", read_completion, completion_choice, CompletionChunks)


def error_body(error: Gemma3nError | str, kind: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": str(error), "type": kind, "param": None, "code": code}}
