"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Annotated, Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import Field

from gemma3n_onnx.runtime.errors import OptionError
from gemma3n_onnx.runtime.generation.detokenizer import IncrementalDetokenizer
from gemma3n_onnx.runtime.generation.logprobs import TokenLogprob
from gemma3n_onnx.runtime.generation.scheduler import PromptEvent, TokenEvent
from gemma3n_onnx.runtime.media.reader import MediaOptions
from gemma3n_onnx.runtime.prompt.tokenizer import BOS_TOKEN
from gemma3n_onnx.runtime.serve.answering import AnswerEvent, Choice, ParsedRequest
from gemma3n_onnx.runtime.serve.model_pool import Served
from gemma3n_onnx.runtime.serve.service import Service
from gemma3n_onnx.runtime.tokens import PromptTokens

from .completion import CompletionKind, StreamChunks, complete, token_text
from .requests import Items, generation_options, require_room
from .response_format import ConstrainedRequest, constraint_of


class CompletionRequest(ConstrainedRequest):
    """`images` and `audio`: URLs, data URLs or base64, one for each soft token of the prompt in order, as `images` of
    Ollama and Fireworks; a list of lists if there are several prompts."""

    prompt: str | Items[str] | Items[int] | Items[Items[int]]
    images: Items[str] | Items[Items[str]] = Field(default_factory=list)
    audio: Items[str] | Items[Items[str]] = Field(default_factory=list)
    image_size: int | None = None
    long_audio: str = "error"
    max_tokens: int | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False

    @property
    def has_media(self) -> bool:
        return bool(self.images or self.audio)


@dataclass(frozen=True)
class Echo:
    """A prompt at the beginning of its answer: token ids, and the text that each of them completes. Special tokens are
    spelled out, as in the prompt; an image or a clip is one placeholder."""

    ids: Sequence[int] = ()
    pieces: Sequence[str] = ()

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass(frozen=True)
class ParsedCompletion(ParsedRequest):
    """`echoes`: of each prompt, if the answers begin with them."""

    echoes: Sequence[Echo] = ()

    def echo_of(self, index: int) -> Echo:
        """The echo that the choice `index` begins with, which may be empty."""
        return self.echoes[index // self.n] if self.echoes else Echo()


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
    served.worker.require_capacity((len(given) if several else 1) * request.n)
    for prompt in given if several else [given]:
        require_room(served, prompt)
    if several:
        prompts = served.model.encode_batch(given, media, images=images, audio=audio)  # type: ignore[arg-type]
    else:
        prompts = [served.model.encode(given, media, images=images, audio=audio)]  # type: ignore[arg-type]
    if request.max_tokens == 0 and not request.echo:
        raise OptionError("max_tokens 0 needs echo; give at least 1.")
    scores = request.echo and request.logprobs is not None
    if scores and served.model.manifest.scorer is None:
        raise OptionError(
            f"{served.name} has no graph that scores given text; leave echo or logprobs out, or export it again."
        )
    return ParsedCompletion(
        prompts,
        generation_options(request, served, prompts, request.max_tokens or None, request.logprobs),
        request.n,
        prompt_logprobs=request.logprobs if scores else None,
        generates=request.max_tokens != 0,
        constrain=constraint_of(request, served.grammars),
        echoes=[_echo(*each, served) for each in zip(given if several else [given], prompts)] if request.echo else (),
    )


def _echo(given: object, prompt: PromptTokens, served: Served) -> Echo:
    tokenizer = served.model.tokenizer
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special=False)
    pieces = [detokenizer.push(token) for token in prompt.ids]
    pieces[-1] += detokenizer.flush()
    if prompt.ids[0] == tokenizer.bos_id and not (isinstance(given, str) and given.startswith(BOS_TOKEN)):
        pieces[0] = ""  # the encoder added it
    for span in prompt.spans:
        pieces[span.start + 1 : span.stop] = [""] * (span.count - 1)
    return Echo(prompt.ids, pieces)


def completion_choice(index: int, choice: Choice, parsed: ParsedCompletion, served: Served) -> dict[str, Any]:
    echo = parsed.echo_of(index)
    logprobs = None if parsed.options.logprobs is None else _logprobs(echo, choice, 0, served)
    return _choice(index, choice, echo.text, logprobs)


def _choice(index: int, choice: Choice, echo: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    finish = None if choice.end is None else choice.end.reason
    return {"index": index, "text": echo + choice.text, "logprobs": logprobs, "finish_reason": finish}


def _logprobs(echo: Echo, choice: Choice, start: int, served: Served) -> dict[str, Any]:
    """Of the echo, whose first token has none, and of the answer. `start`: where the text begins in the whole."""
    scored = [*choice.prompt_logprobs, *choice.logprobs]
    ids = [*echo.ids[:1], *(token.token_id for token in scored)]
    unscored = [None] * len(echo.ids[:1])
    offsets = accumulate(map(len, (*echo.pieces, *choice.pieces)), initial=start)
    return {
        "tokens": [token_text(token_id, served)[0] for token_id in ids],
        "token_logprobs": [*unscored, *(token.logprob for token in scored)],
        "top_logprobs": [*unscored, *(_top(token, served) for token in scored)],
        "text_offset": [*islice(offsets, len(ids))],
    }


def _top(token: TokenLogprob, served: Served) -> dict[str, float]:
    """By text; a token whose text is another's too is named by its id."""
    listed: dict[str, float] = {}
    for token_id, logprob, _ in token.top:
        text = token_text(token_id, served)[0]
        listed[f"token_id:{token_id}" if text in listed else text] = logprob
    return listed


class CompletionChunks(StreamChunks[ParsedCompletion]):
    object, prefix = "text_completion", "cmpl"

    def __init__(self, parsed: ParsedCompletion, served: Served, *, with_usage: bool) -> None:
        super().__init__(parsed, served, with_usage=with_usage)
        self._offsets = [0] * len(self._choices)

    def first(self) -> list[dict[str, Any]]:
        if not self._parsed.echoes or self._parsed.options.logprobs is not None:
            return []
        return [self._chunk(self._part(i, Choice(), self._parsed.echo_of(i))) for i in range(len(self._choices))]

    def _parts(self, index: int, event: AnswerEvent) -> list[dict[str, Any]]:
        if isinstance(event, TokenEvent) and not event.text and event.logprob is None:
            return []
        if isinstance(event, PromptEvent) and self._parsed.options.logprobs is None:
            return []
        now = Choice()
        now.add(event)
        return [self._part(index, now, self._parsed.echo_of(index) if isinstance(event, PromptEvent) else Echo())]

    def _part(self, index: int, now: Choice, echo: Echo) -> dict[str, Any]:
        logprobs = None
        if self._parsed.options.logprobs is not None:
            logprobs = _logprobs(echo, now, self._offsets[index], self._served)
        self._offsets[index] += len(echo.text + now.text)
        return _choice(index, now, echo.text, logprobs)


COMPLETION = CompletionKind("text_completion", "cmpl", read_completion, completion_choice, CompletionChunks)
