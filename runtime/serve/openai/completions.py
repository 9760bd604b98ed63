"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Annotated, Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import Field

from gemma3n_onnx.runtime.errors import OptionError
from gemma3n_onnx.runtime.generation.logprobs import TokenLogprob
from gemma3n_onnx.runtime.generation.scheduler import FinishEvent, TokenEvent
from gemma3n_onnx.runtime.media.reader import MediaOptions
from gemma3n_onnx.runtime.serve.answering import Choice, ParsedRequest
from gemma3n_onnx.runtime.serve.model_pool import Served
from gemma3n_onnx.runtime.serve.service import Service
from gemma3n_onnx.runtime.tokens import PromptTokens

from .completion import CompletionKind, StreamChunks, complete, token_text
from .requests import generation_options, new_tokens
from .response_format import ConstrainedRequest, constrained, constraint_of


class CompletionRequest(ConstrainedRequest):
    """`images` and `audio`: URLs, data URLs or base64, one for each soft token of the prompt in order, as `images` of
    Ollama and Fireworks; a list of lists if there are several prompts."""

    prompt: str | list[str] | list[int] | list[list[int]]
    images: list[str] | list[list[str]] = Field(default_factory=list)
    audio: list[str] | list[list[str]] = Field(default_factory=list)
    image_size: int | None = None
    long_audio: str = "error"
    max_tokens: int | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False


@dataclass(frozen=True)
class ParsedCompletion(ParsedRequest):
    """`echoes`: each prompt's ids and text, where they begin the answer."""

    echoes: Sequence[tuple[list[int], str]] = ()


def add_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, http: HttpRequest) -> Response:
        return await complete(COMPLETION, request, service, http)


def read_completion(request: CompletionRequest, served: Served) -> ParsedCompletion:
    """Reads media and tokenizes. Raises Gemma3nError: what is wrong with the request."""
    given = request.prompt
    several = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
    media = MediaOptions(
        image_size=request.image_size,
        long_audio=request.long_audio,  # type: ignore[arg-type]
    )
    images, audio = request.images or None, request.audio or None
    if several:
        prompts = served.model.encode_batch(given, media, images=images, audio=audio)  # type: ignore[arg-type]
    else:
        prompts = [served.model.encode(given, media, images=images, audio=audio)]  # type: ignore[arg-type]
    if request.echo:
        return _read_echo(request, served, prompts)
    if request.max_tokens == 0:
        raise OptionError("max_tokens 0 needs echo; give at least 1.")
    options = generation_options(request, served, prompts, request.max_tokens, request.logprobs)
    return constrained(ParsedCompletion(prompts, options, request.n), constraint_of(request, served.grammars))


def _read_echo(request: CompletionRequest, served: Served, prompts: list[PromptTokens]) -> ParsedCompletion:
    """The answer begins with the prompt. Log-probabilities of its tokens take a decode step each, because the artifact
    computes logits of the last position only: all but the first token are forced."""
    if request.images or request.audio:
        raise OptionError("echo takes prompts without images and audio; leave echo out.")
    if request.logprobs is None and request.max_tokens != 0:
        options = generation_options(request, served, prompts, request.max_tokens, None)
        echoes: list[tuple[list[int], str]] = [([], served.model.tokenizer.decode(prompt.ids)) for prompt in prompts]
        return constrained(
            ParsedCompletion(prompts, options, request.n, echoes=echoes), constraint_of(request, served.grammars)
        )
    if len(prompts) > 1 or request.stop or constraint_of(request, served.grammars) is not None:
        raise OptionError(
            "echo with logprobs, or with max_tokens 0, takes one prompt and neither stop nor a constraint."
        )
    (prompt,) = prompts
    first, forced = prompt.ids[:1], prompt.ids[1:]
    more = new_tokens(served, prompts, request.max_tokens) if request.max_tokens != 0 else 0
    options = generation_options(request, served, prompts, 1, request.logprobs)
    if not forced and not more:
        raise OptionError("The prompt has a single token and max_tokens is 0; there is nothing to compute.")
    options = replace(options, max_new_tokens=len(forced) + more)
    text = served.model.tokenizer.decode(first)
    return ParsedCompletion([PromptTokens(first)], options, request.n, forced=forced, echoes=[(first, text)])


def completion_choice(index: int, choice: Choice, parsed: ParsedCompletion, served: Served) -> dict[str, Any]:
    ids, text = parsed.echoes[index // parsed.n] if parsed.echoes else ([], "")
    return _choice(
        index, choice, text, None if parsed.options.logprobs is None else _logprobs(ids, text, choice, 0, served)
    )


def _choice(index: int, choice: Choice, echo: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    finish = None if choice.end is None else choice.end.reason
    return {"index": index, "text": echo + choice.text, "logprobs": logprobs, "finish_reason": finish}


def _logprobs(echo: Sequence[int], echoed: str, choice: Choice, start: int, served: Served) -> dict[str, Any]:
    """`echo`: tokens before the first that has a log-probability. `start`: where the text begins in the answer."""
    texts = [token_text(token_id, served)[0] for token_id in [*echo, *(token.token_id for token in choice.logprobs)]]
    # Each token completes a piece of the text; the first of an echo has no event of its own.
    lengths = [len(text) for text in (*([echoed] if echo else []), *choice.pieces)]
    offsets = [start, *(start + length for length in accumulate(lengths))]
    return {
        "tokens": texts,
        "token_logprobs": [*([None] * len(echo)), *(token.logprob for token in choice.logprobs)],
        "top_logprobs": [*([None] * len(echo)), *(_top(token, served) for token in choice.logprobs)],
        "text_offset": offsets[: len(texts)],
    }


def _top(token: TokenLogprob, served: Served) -> dict[str, float]:
    """By text; a token whose text is another's too is named by its id."""
    listed: dict[str, float] = {}
    for token_id, logprob in token.top:
        text = token_text(token_id, served)[0]
        listed[f"token_id:{token_id}" if text in listed else text] = logprob
    return listed


class CompletionChunks(StreamChunks[ParsedCompletion]):
    object, prefix = "text_completion", "cmpl"

    def __init__(self, parsed: ParsedCompletion, served: Served, *, with_usage: bool) -> None:
        super().__init__(parsed, served, with_usage=with_usage)
        self._offsets = [0] * len(self._choices)

    def first(self) -> list[dict[str, Any]]:
        echoed = enumerate(self._parsed.echoes[index // self._parsed.n] for index in range(len(self._choices)))
        return (
            [self._chunk(self._part(index, Choice(), ids, text)) for index, (ids, text) in echoed]
            if self._parsed.echoes
            else []
        )

    def _parts(self, index: int, event: TokenEvent | FinishEvent) -> list[dict[str, Any]]:
        if isinstance(event, TokenEvent) and not event.text and event.logprob is None:
            return []
        now = Choice()
        now.add(event)
        return [self._part(index, now, [], "")]

    def _part(self, index: int, now: Choice, ids: Sequence[int], echo: str) -> dict[str, Any]:
        logprobs = None
        if self._parsed.options.logprobs is not None:
            logprobs = _logprobs(ids, echo, now, self._offsets[index], self._served)
        self._offsets[index] += len(echo + now.text)
        return _choice(index, now, echo, logprobs)


COMPLETION = CompletionKind("text_completion", "cmpl", read_completion, completion_choice, CompletionChunks)
