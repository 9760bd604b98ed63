"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import Field

from gemma3n_onnx.runtime.generation.logprobs import TokenLogprob
from gemma3n_onnx.runtime.generation.scheduler import FinishEvent, TokenEvent
from gemma3n_onnx.runtime.serve.answering import Choice, ParsedRequest
from gemma3n_onnx.runtime.serve.model_pool import Served
from gemma3n_onnx.runtime.serve.service import Service

from .completion import CompletionKind, StreamChunks, complete, token_text
from .requests import SamplingRequest, generation_options


class CompletionRequest(SamplingRequest):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


def add_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, http: HttpRequest) -> Response:
        return await complete(COMPLETION, request, service, http)


def read_completion(request: CompletionRequest, served: Served) -> ParsedRequest:
    """Tokenizes. Raises Gemma3nError: what is wrong with the request."""
    given = request.prompt
    several = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
    prompts = [served.model.encode(prompt) for prompt in (given if several else [given])]
    options = generation_options(request, served, prompts, request.max_tokens, request.logprobs)
    return ParsedRequest(prompts, options, request.n)


def completion_choice(index: int, choice: Choice, parsed: ParsedRequest, served: Served) -> dict[str, Any]:
    return {
        "index": index,
        "text": choice.text,
        "logprobs": None if parsed.options.logprobs is None else _logprobs(choice.logprobs, served),
        "finish_reason": None if choice.end is None else choice.end.reason,
    }


def _logprobs(found: Sequence[TokenLogprob], served: Served) -> dict[str, Any]:
    texts = [token_text(token.token_id, served) for token in found]
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in found],
        "top_logprobs": [{token_text(id_, served): logprob for id_, logprob in token.top} for token in found],
        "text_offset": [0, *accumulate(map(len, texts))][: len(texts)],
    }


class CompletionChunks(StreamChunks[ParsedRequest]):
    object, prefix = "text_completion", "cmpl"

    def _parts(self, index: int, event: TokenEvent | FinishEvent) -> list[dict[str, Any]]:
        if isinstance(event, TokenEvent) and not event.text and event.logprob is None:
            return []
        now = Choice()
        now.add(event)
        return [completion_choice(index, now, self._parsed, self._served)]


COMPLETION = CompletionKind("text_completion", "cmpl", read_completion, completion_choice, CompletionChunks)
