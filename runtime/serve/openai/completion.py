"""What chat and text completions share: the envelope, usage, chunks of a stream, and how a request is answered."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from gemma3n_onnx.runtime.generation.logprobs import TokenLogprob
from gemma3n_onnx.runtime.generation.result import RowTimings, batch_timings
from gemma3n_onnx.runtime.serve.answering import AnswerEvent, Choice, ParsedRequest
from gemma3n_onnx.runtime.serve.model_pool import Served
from gemma3n_onnx.runtime.serve.service import ServerSentEvents, Service

from .requests import SamplingRequest

Parsed = TypeVar("Parsed", bound=ParsedRequest)


class StreamChunks(ABC, Generic[Parsed]):
    """A `StreamFormat` of completion chunks."""

    object: str
    prefix: str
    sse = ServerSentEvents()

    def __init__(self, parsed: Parsed, served: Served, *, with_usage: bool) -> None:
        self._parsed, self._served, self._with_usage = parsed, served, with_usage
        self._head = envelope(self.object, self.prefix, served.name)
        self._choices = [Choice() for _ in range(len(parsed.prompts) * parsed.n)]

    def first(self) -> list[dict[str, Any]]:
        return []

    def next(self, index: int, event: AnswerEvent) -> list[dict[str, Any]]:
        self._choices[index].add(event)
        return [self._chunk(choice) for choice in self._parts(index, event)]

    def last(self) -> list[dict[str, Any]]:
        if not self._with_usage:
            return []
        return [{**self._head, "choices": [], "usage": usage(self._choices, self._parsed)}]

    def _chunk(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        chunk: dict[str, Any] = {**self._head, "choices": [choice]}
        return {**chunk, "usage": None} if self._with_usage else chunk

    @abstractmethod
    def _parts(self, index: int, event: AnswerEvent) -> list[dict[str, Any]]:
        """Choices of the chunks to send after an event."""


@dataclass(frozen=True)
class CompletionKind(Generic[Parsed]):
    """How one kind of completion is read and written."""

    object: str
    prefix: str
    read: Callable[[Any, Served], Parsed]
    choice: Callable[[int, Choice, Parsed, Served], dict[str, Any]]
    chunks: type[StreamChunks[Parsed]]


async def complete(kind: CompletionKind[Parsed], request: SamplingRequest, service: Service, http: Request) -> Response:
    """The whole answer as JSON, or a stream of chunks."""
    async with service.held(request.model) as served:
        parsed = await service.read(kind.read, request, served, http)
        if parsed.prompt_logprobs is not None:
            await service.reserve_scorer(served)
        if request.stream:
            chunks = kind.chunks(parsed, served, with_usage=request.wants_usage)
            return service.stream(parsed, served, chunks, http)
        choices = await service.answer(parsed, served, http)
    listed = [kind.choice(i, choice, parsed, served) for i, choice in enumerate(choices)]
    body = {**envelope(kind.object, kind.prefix, served.name), "choices": listed}
    return JSONResponse({**body, "usage": usage(choices, parsed), **parsed.warnings})


def envelope(kind: str, prefix: str, model: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def usage(choices: Sequence[Choice], parsed: ParsedRequest) -> dict[str, Any]:
    """A prompt counts once for its answers."""
    ends, n = [choice.end for choice in choices if choice.end is not None], parsed.n
    prompt = sum(end.prompt_tokens for end in ends[::n])
    made = sum(end.new_tokens for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in ends[::n])},
        **_speeds([end.timings for end in ends]),
    }


def _speeds(timings: Sequence[RowTimings]) -> dict[str, float]:
    """Not OpenAI's fields: rates in tokens per second, over all sequences of the request."""
    if not timings:
        return {}
    whole = batch_timings(timings, None)
    return {
        "time_to_first_token": round(whole.time_to_first_token, 4),
        "prompt_tokens_per_second": round(whole.prefill_tokens_per_second, 1),
        "completion_tokens_per_second": round(whole.decode_tokens_per_second, 1),
    }


def listed_logprobs(tokens: Sequence[TokenLogprob], served: Served) -> list[dict[str, Any]]:
    """Log-probabilities in the form of chat completions and responses."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text, spelled = token_text(token_id, served)
        return {"token": text, "logprob": logprob, "bytes": [*spelled]}

    return [
        {
            **entry(token.token_id, token.logprob),
            "top_logprobs": [entry(likely.token_id, likely.logprob) for likely in token.top],
        }
        for token in tokens
    ]


def token_text(token_id: int, served: Served) -> tuple[str, bytes]:
    """As of `Tokenizer.token_text`, and the token's bytes."""
    tokenizer = served.model.tokenizer
    text, byte = tokenizer.token_text(token_id), tokenizer.bytes_by_id.get(token_id)
    return text, text.encode() if byte is None else bytes([byte])
