"""Text of a generation as it is made, and what it comes to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma3n_onnx.runtime.engine.engine import Engine
from gemma3n_onnx.runtime.engine.kv_cache import KVCache
from gemma3n_onnx.runtime.engine.prefix_cache import PrefixCache
from gemma3n_onnx.runtime.errors import OptionError
from gemma3n_onnx.runtime.media.reader import MediaOptions
from gemma3n_onnx.runtime.prompt.tokenizer import IncrementalDetokenizer, StopMatcher, Tokenizer
from gemma3n_onnx.runtime.tokens import PromptTokens

from .generation import Generation, Timings
from .sampling import GenerationOptions, TokenLogprob


@dataclass(frozen=True)
class GenerationResult:
    """One answer.

    `text` leaves out special tokens and everything from a stop string on; `token_ids` are all that were
    made. `finish_reason` is "stop" (an end token or a stop string) or "length" (`max_new_tokens`).
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] | None
    timings: Timings


class Answer:
    """Text of a generation as it is made. Iterate for pieces; `results()` when done."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prompts: Sequence[PromptTokens],
        options: GenerationOptions,
        cache: KVCache | None = None,
        cached_ids: Sequence[int] = (),
        kept_prompts: PrefixCache | None = None,
    ) -> None:
        self._prompts = [[*cached_ids, *prompt.ids] for prompt in prompts]
        self._options = options
        self._generation = Generation(engine, prompts, options, cache, cached_ids, kept_prompts)
        self._rows = [AnswerText(tokenizer, options) for _ in prompts]
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(self) -> Iterator[str]:
        for token in self._generation:
            row = self._rows[token.row]
            piece = row.push(token.token_id, token.logprob, token.finish)
            if row.finish is not None:
                self._generation.stop(token.row)
            if piece:
                yield piece

    def results(self) -> list[GenerationResult]:
        timings = self._generation.timings
        return [
            GenerationResult(
                text="".join(row.text),
                token_ids=tuple(row.token_ids),
                prompt_token_ids=tuple(prompt),
                finish_reason=row.finish or "stop",
                logprobs=None if self._options.logprobs is None else tuple(row.logprobs),
                timings=timings,
            )
            for row, prompt in zip(self._rows, self._prompts)
        ]

    @property
    def result(self) -> GenerationResult:
        return self.results()[0]


class AnswerText:
    """What has been made of one answer so far."""

    def __init__(self, tokenizer: Tokenizer, options: GenerationOptions) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._matcher = StopMatcher(options.stop)
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish: str | None = None

    def push(self, token_id: int, logprob: TokenLogprob | None, finish: str | None) -> str:
        self.token_ids.append(token_id)
        if logprob is not None:
            self.logprobs.append(logprob)
        piece = self._matcher.push(self._detokenizer.push(token_id))
        if finish and self._matcher.matched is None:
            piece += self._matcher.push(self._detokenizer.flush())
            if self._matcher.matched is None:
                piece += self._matcher.flush()
        self.finish = "stop" if self._matcher.matched is not None else finish
        self.text.append(piece)
        return piece


def read_options(options: Mapping[str, Any]) -> tuple[GenerationOptions, MediaOptions]:
    """Raises OptionError for an unknown option, as for a bad value."""
    kinds = (GenerationOptions, MediaOptions)
    known = [name for kind in kinds for name in kind.__dataclass_fields__]
    if unknown := sorted(options.keys() - set(known)):
        raise OptionError(f"Unknown option {unknown[0]!r}; known are {', '.join(known)}.")
    generation, media = ({k: v for k, v in options.items() if k in kind.__dataclass_fields__} for kind in kinds)
    return GenerationOptions(**generation), MediaOptions(**media)
