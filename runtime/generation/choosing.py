"""The choices of one row, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .sampling import GenerationOptions, Sampler, TokenCounts, TokenLogprob, log_probabilities, rng_for


class Chooser:
    """What a row's choices depend on beside the logits: its tokens so far, its stream of random numbers and its
    constraint. `sample` tells apart several continuations of one prompt."""

    def __init__(self, options: GenerationOptions, prompt: Sequence[int], sample: int = 0) -> None:
        self.options, self._sampler = options, Sampler(options)
        self._counts = TokenCounts(prompt)
        self._random = rng_for(options.seed, sample)
        self._constraint = options.constraint() if options.constraint is not None else None

    @property
    def takes_likeliest(self) -> bool:
        """Whether it needs nothing of the logits but the largest."""
        return self._sampler.takes_likeliest and self.options.logprobs is None

    @property
    def candidates(self) -> int | None:
        """As of `Sampler`, None also where log-probabilities are reported, which take all logits."""
        return None if self.options.logprobs is not None else self._sampler.candidates

    def choose(self, logits: np.ndarray) -> tuple[int, TokenLogprob | None]:
        """From logits float32 [V]; errors as of `Sampler.choose`."""
        allowed = logits if self._constraint is None else self._constraint.allow(logits)
        token = self.took(self._sampler.choose(allowed, self._counts, self._random))
        wanted = self.options.logprobs
        return token, None if wanted is None else log_probabilities(logits, token, wanted)

    def choose_among(self, ids: np.ndarray, logits: np.ndarray) -> int:
        """As `Sampler.choose_among`, where there are `candidates`."""
        return self.took(self._sampler.choose_among(ids, logits, self._random))

    def took(self, token: int) -> int:
        self._counts.add(token)
        if self._constraint is not None:
            self._constraint.take(token)
        return token
