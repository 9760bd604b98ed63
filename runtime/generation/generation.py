"""A batch being generated: prefill each prompt, then one token a step for all rows. Knows nothing of text."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gemma3n_onnx.runtime.artifact import Manifest
from gemma3n_onnx.runtime.engine.candidates import Chosen
from gemma3n_onnx.runtime.engine.engine import Engine
from gemma3n_onnx.runtime.engine.kv_cache import KVCache
from gemma3n_onnx.runtime.engine.prefix_cache import PrefixCache
from gemma3n_onnx.runtime.errors import ContextLengthError
from gemma3n_onnx.runtime.tokens import PromptTokens

from .choosing import Chooser
from .sampling import GenerationOptions, TokenLogprob


@dataclass(frozen=True)
class GeneratedToken:
    """`finish` is set on the last token of a row: "stop" after an end token, else "length"."""

    row: int
    token_id: int
    logprob: TokenLogprob | None
    finish: str | None


@dataclass(frozen=True)
class Timings:
    """Seconds and tokens of one generation; a batch shares them. Rates count the tokens of all rows.

    `encoder_seconds` are those of images and clips; the first use of an encoder loads it. `cached_tokens` of the prompt
    were taken from an earlier one and not run.
    """

    encoder_seconds: float
    cached_tokens: int
    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float
    time_to_first_token: float
    peak_memory_bytes: int | None

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


class Generation:
    """Iterate for tokens in the order in which they are made; `stop(row)` ends a row early.

    With a `cache` of one row, `prompts[0]` is what follows the tokens that the cache already holds. Without it, a
    single prompt may begin as one of `kept_prompts` does, and becomes one of them.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[PromptTokens],
        options: GenerationOptions,
        cache: KVCache | None = None,
        cached_ids: Sequence[int] = (),
        kept_prompts: PrefixCache | None = None,
    ) -> None:
        longest = len(cached_ids) + max(map(len, prompts))
        check_context(engine.manifest.max_context, longest, options.max_new_tokens)
        self._engine, self._options, self._prompts = engine, options, prompts
        self._cache = cache or engine.new_cache(len(prompts), longest + options.max_new_tokens)
        self._choosers = [Chooser(options, [*cached_ids, *prompt.ids]) for prompt in prompts]
        self._running = np.ones(len(prompts), dtype=bool)
        self._encoder_seconds = self._prefill_seconds = self._decode_seconds = self._first_token = 0.0
        self._decode_tokens = self._cached_tokens = 0
        self._kept_prompts = kept_prompts if cache is None and len(prompts) == 1 else None

    def stop(self, row: int) -> None:
        self._running[row] = False

    def __iter__(self) -> Iterator[GeneratedToken]:
        # 1. Prefill, row by row: no padding, and memory that does not grow with the batch.
        started = time.perf_counter()
        logits = np.stack([self._prefill(row, prompt) for row, prompt in enumerate(self._prompts)])
        # 2. What the next tokens are chosen from: ids [B], or the few of each row that are in play, or the logits.
        tokens = np.full(len(self._prompts), self._engine.manifest.pad_token_id, dtype=np.int64)
        decoder = self._engine.step_runner(self._cache)
        likeliest: np.ndarray | None = None
        few: list[Chosen] | None = None
        only_likeliest = self._choosers[0].takes_likeliest
        wanted = self._choosers[0].candidates if decoder.has_candidates else None
        for made in range(1, self._options.max_new_tokens + 1):
            # 3. Choose a token for each running row.
            for row in np.flatnonzero(self._running):
                chooser, logprob = self._choosers[row], None
                if likeliest is not None:
                    chosen = chooser.took(int(likeliest[row]))
                elif few is not None:
                    chosen = chooser.choose_among(*few[row])
                else:
                    chosen, logprob = chooser.choose(logits[row])
                finish = finish_of(self._engine.manifest, self._options, chosen, made)
                token = GeneratedToken(int(row), chosen, logprob, finish)
                tokens[row] = chosen
                if token.finish:
                    self.stop(int(row))
                if not self._first_token:
                    self._first_token = time.perf_counter() - started
                yield token
            if not self._running.any():
                break
            # 4. Run the chosen tokens.
            step_started = time.perf_counter()
            if only_likeliest:
                likeliest = decoder.step_greedy(tokens, self._running)
            elif wanted is not None:
                few = decoder.step_candidates(tokens, self._running, wanted)
            else:
                logits = decoder.step(tokens, self._running)
            self._decode_seconds += time.perf_counter() - step_started
            self._decode_tokens += int(self._running.sum())

    def _prefill(self, row: int, prompt: PromptTokens) -> np.ndarray:
        started = time.perf_counter()
        kept = self._kept_prompts and self._kept_prompts.begin(prompt.keys(), self._cache)
        if kept:
            self._cached_tokens = int(self._cache.lengths[row])
            prompt = prompt.after(self._cached_tokens)
        copied = time.perf_counter()
        prompt = prompt.encoded()
        encoded = time.perf_counter()
        if self._kept_prompts and kept:
            logits = self._kept_prompts.run(self._engine, kept, prompt)
        else:
            logits = self._engine.prefill(self._cache, row, prompt.ids, prompt.slots)
        self._encoder_seconds += encoded - copied
        self._prefill_seconds += time.perf_counter() - encoded + copied - started
        return logits

    @property
    def timings(self) -> Timings:
        return Timings(
            encoder_seconds=self._encoder_seconds,
            cached_tokens=self._cached_tokens,
            prefill_tokens=sum(map(len, self._prompts)) - self._cached_tokens,
            prefill_seconds=self._prefill_seconds,
            decode_tokens=self._decode_tokens,
            decode_seconds=self._decode_seconds,
            time_to_first_token=self._first_token,
            peak_memory_bytes=peak_memory_bytes(),
        )


def finish_of(manifest: Manifest, options: GenerationOptions, token: int, made: int) -> str | None:
    """Why an answer ends with its `made`-th token, as `GeneratedToken.finish`."""
    if token in manifest.eos_token_ids:
        return "stop"
    return "length" if made == options.max_new_tokens else None


def check_context(max_context: int, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raises ContextLengthError where prompt and answer together may exceed the context."""
    if prompt_tokens + max_new_tokens > max_context:
        raise ContextLengthError(
            f"The prompt has {prompt_tokens:,} tokens and max_new_tokens is {max_new_tokens:,}, which is more "
            f"than the context of {max_context:,}; shorten the prompt or lower max_new_tokens."
        )


def peak_memory_bytes() -> int | None:
    """The process's largest resident size so far, mapped files included; None where the system has no count."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
