"""Samples a token from the logits of one row: penalties, temperature, top-k, top-p, min-p and a draw, in the order of
transformers.

Legend: V = vocabulary, n = remaining candidates; logits are float32 [V] or [n] and are never modified.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from gemma3n_onnx.runtime.errors import no_token

from .logits_processors import (
    GROUP_SIZE,
    TokenCounts,
    apply_bias,
    apply_temperature,
    min_p_positions,
    penalize,
    relative_weights,
    top_k_positions,
    top_p_positions,
)
from .logprobs import TokenLogprob, log_probabilities
from .options import GenerationOptions


def _draw_weighted(weights: np.ndarray, rng: np.random.Generator) -> int:
    """Position i of weights [n] with probability weights[i] / sum; never one of weight 0."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    below = min(rng.random() * cumulative[-1], np.nextafter(cumulative[-1], 0))
    return int(np.searchsorted(cumulative, below, side="right"))


def draw(logits: np.ndarray, rng: np.random.Generator) -> int:
    """Position i of logits [n] with probability softmax(logits)[i]: draws its group, then the position."""
    weights = relative_weights(logits)
    starts = np.arange(0, len(weights), GROUP_SIZE)
    start = int(starts[_draw_weighted(np.add.reduceat(weights, starts, dtype=np.float64), rng)])
    return start + _draw_weighted(weights[start : start + GROUP_SIZE], rng)


@dataclass(frozen=True)
class Sampler:
    """Samples a token by the options; stateless."""

    options: GenerationOptions

    @property
    def is_greedy(self) -> bool:
        """Whether the argmax of the model's logits is always sampled."""
        return self.options.temperature == 0 and not self._processes

    @property
    def candidates(self) -> int | None:
        """How many of the largest logits, with ties, suffice to sample; None if all are needed."""
        return None if self._processes or self.options.temperature == 0 else self.options.top_k

    @property
    def _processes(self) -> bool:
        """Whether logits processors change the logits before sampling."""
        return self._penalizes or bool(self.options.logit_bias) or self.options.logits_processor is not None

    @property
    def _penalizes(self) -> bool:
        o = self.options
        return (o.repetition_penalty, o.presence_penalty, o.frequency_penalty) != (1, 0, 0)

    def sample(self, logits: np.ndarray, counts: TokenCounts, rng: np.random.Generator) -> int:
        """The next token's id from logits float32 [V], the row's token counts and random stream.

        -inf excludes a token. ProviderError: a logit is NaN or +inf, or every token is excluded.
        """
        o = self.options
        if o.logit_bias:
            logits = apply_bias(logits, o.logit_bias)
        if self._penalizes:
            logits = penalize(logits, counts, o.repetition_penalty, o.presence_penalty, o.frequency_penalty)
        likeliest = int(logits.argmax())  # the first NaN, if any
        if not np.isfinite(logits[likeliest]):
            raise no_token(float(logits[likeliest]))
        if o.temperature == 0:
            return likeliest
        return self._draw(logits, None, rng)

    def sample_candidates(self, ids: np.ndarray, logits: np.ndarray, rng: np.random.Generator) -> int:
        """Like `sample`, from at least `candidates` ids [n], ascending, and their logits [n], the largest of them
        finite."""
        return self._draw(logits, ids, rng)

    def _draw(self, logits: np.ndarray, ids: np.ndarray | None, rng: np.random.Generator) -> int:
        """`ids` None: all ids."""
        logits = apply_temperature(logits, self.options.temperature)
        for positions_to_keep in self._filters():
            kept = positions_to_keep(logits)
            ids = kept if ids is None else ids[kept]
            logits = logits[kept]
        drawn = draw(logits, rng)
        return drawn if ids is None else int(ids[drawn])

    def _filters(self) -> list[Callable[[np.ndarray], np.ndarray]]:
        o = self.options
        filters: list[Callable[[np.ndarray], np.ndarray]] = []
        if o.top_k is not None:
            filters.append(partial(top_k_positions, k=o.top_k))
        if o.top_p is not None and o.top_p < 1:
            filters.append(partial(top_p_positions, p=o.top_p))
        if o.min_p is not None and o.min_p > 0:
            filters.append(partial(min_p_positions, p=o.min_p))
        return filters


class SamplerState:
    """A row's sampler with its state: token counts, a random stream and a logits processor. `sample` numbers the
    continuations of one prompt."""

    def __init__(self, options: GenerationOptions, prompt: Sequence[int], sample: int = 0) -> None:
        self.options, self._sampler = options, Sampler(options)
        self._counts = TokenCounts(prompt)
        self._random = rng_for(options.seed, sample)
        self._processor = None if options.logits_processor is None else options.logits_processor()

    @property
    def takes_argmax(self) -> bool:
        """As `Sampler.is_greedy`."""
        return self._sampler.is_greedy

    @property
    def is_greedy(self) -> bool:
        """Whether the argmax of the logits suffices, and no log-probability is requested."""
        return self.takes_argmax and self.options.logprobs is None

    @property
    def candidates(self) -> int | None:
        """As in `Sampler`; also None if log-probabilities are requested, which need all logits."""
        return None if self.options.logprobs is not None else self._sampler.candidates

    def sample(self, logits: np.ndarray) -> tuple[int, TokenLogprob | None]:
        """Samples and accepts a token from logits float32 [V]; errors as in `Sampler.sample`."""
        processed = logits if self._processor is None else self._processor.process(logits)
        token = self.accept(self._sampler.sample(processed, self._counts, self._random))
        count = self.options.logprobs
        return token, None if count is None else log_probabilities(logits, token, count)

    def sample_candidates(self, ids: np.ndarray, logits: np.ndarray) -> int:
        """Like `Sampler.sample_candidates`, if `candidates` is a number; accepts the token."""
        return self.accept(self._sampler.sample_candidates(ids, logits, self._random))

    def accept(self, token: int) -> int:
        """Counts a token as generated, and returns it."""
        self._counts.add(token)
        if self._processor is not None:
            self._processor.accept(token)
        return token


def rng_for(seed: int | None, sample: int = 0) -> np.random.Generator:
    """The random stream of one row.

    It does not depend on the row's index: with a seed, a prompt draws the same numbers in a batch as alone.
    `sample` numbers the continuations of one prompt, whose streams are independent. Without a seed every
    stream is new.
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(sample,))))
