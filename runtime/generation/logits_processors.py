"""Logits processors and sampling filters for one row.

Legend: V = vocabulary, n = remaining candidates; logits are float32 [V] or [n] and are never modified.
The definitions are those of transformers' logits processors (`generation/logits_process.py`); presence and frequency
penalties are those of the OpenAI API.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from gemma3n_onnx.runtime.errors import OptionError

GROUP_SIZE = 128  # values per partial maximum or sum; V / 128 groups are cheap to search
LOWEST = np.finfo(np.float32).min  # the lowest finite logit


class LogitsProcessor(Protocol):
    """Restricts the next token of one sequence, for example to JSON that matches a schema."""

    def process(self, logits: np.ndarray) -> np.ndarray:
        """A copy of logits [V], -inf for tokens that may not come next."""
        ...

    def accept(self, token: int) -> None:
        """Advances by the sampled `token`."""
        ...


class TokenCounts:
    """The distinct tokens of one row, and how often each was generated; adding one is amortized O(1)."""

    def __init__(self, prompt: Sequence[int] | np.ndarray) -> None:
        distinct = np.unique(np.asarray(prompt, dtype=np.int64))
        self._slot = {token: slot for slot, token in enumerate(distinct.tolist())}
        self._ids = distinct
        self._generated = np.zeros(len(distinct), np.int32)

    def add(self, token: int) -> None:
        """Count one generated token."""
        slot = self._slot.setdefault(token, len(self._slot))
        if slot == len(self._ids):
            room = len(self._ids) + 64
            self._ids = np.concatenate([self._ids, np.empty(room, np.int64)])
            self._generated = np.concatenate([self._generated, np.zeros(room, np.int32)])
        self._ids[slot] = token
        self._generated[slot] += 1

    @property
    def ids(self) -> np.ndarray:
        """int64 [touched]: every token of prompt and generation, once."""
        return self._ids[: len(self._slot)]

    @property
    def generated(self) -> np.ndarray:
        """int32 [touched]: how often each of `ids` was generated."""
        return self._generated[: len(self._slot)]


def penalize(
    logits: np.ndarray, counts: TokenCounts, repetition: float, presence: float, frequency: float
) -> np.ndarray:
    """Logits [V] with penalties applied to the tokens already seen.

    Repetition (Keskar et al. 2019, arXiv 1909.05858) divides a positive logit and multiplies a negative
    one.
    """
    seen = logits[counts.ids]
    seen = np.where(seen < 0, seen * repetition, seen / repetition)
    seen -= presence * (counts.generated > 0) + frequency * counts.generated
    penalized = logits.copy()
    penalized[counts.ids] = seen
    return penalized


def apply_bias(logits: np.ndarray, bias: Mapping[int, float]) -> np.ndarray:
    """Logits [V] plus `bias`, by token id. OptionError: an id is beyond the vocabulary."""
    if (largest := max(bias)) >= len(logits):
        raise OptionError(f"logit_bias has the token id {largest}; the largest id is {len(logits) - 1}.")
    biased = logits.copy()
    biased[list(bias)] += np.fromiter(bias.values(), np.float32, len(bias))
    return biased


def apply_temperature(logits: np.ndarray, temperature: float) -> np.ndarray:
    """(logits - max) / temperature, [n]: subtracting the maximum first prevents overflow."""
    scaled = logits - logits.max()
    with np.errstate(over="ignore"):  # a low temperature sends unlikely tokens to -inf, as intended
        scaled /= np.clip(temperature, np.finfo(np.float32).tiny, np.finfo(np.float32).max).astype(np.float32)
    return scaled


def relative_weights(logits: np.ndarray) -> np.ndarray:
    """exp(logits - max), float32 [n], in one new array: a temporary costs as much as the arithmetic."""
    weights = logits - logits.max()
    return np.exp(weights, out=weights)


def _kth_largest(values: np.ndarray, k: int) -> np.float32:
    """The k-th largest of values [n], 1 <= k <= n, without a full sort."""
    groups = len(values) // GROUP_SIZE
    if k <= groups // 4:
        # At least k values reach the k-th largest group maximum, and few others do.
        maxima = values[: groups * GROUP_SIZE].reshape(GROUP_SIZE, groups).max(axis=0)
        values = values[values >= np.partition(maxima, groups - k)[groups - k]]
    return np.partition(values, len(values) - k)[len(values) - k]


def top_k_positions(logits: np.ndarray, k: int) -> np.ndarray:
    """Positions, ascending, of the k largest of logits [n] and all ties of the k-th; none is -inf."""
    return np.flatnonzero(logits >= max(_kth_largest(logits, min(k, len(logits))), LOWEST))


def top_p_positions(logits: np.ndarray, p: float) -> np.ndarray:
    """Positions, ascending, of the fewest largest of logits [n] with total probability p, and all ties of the last.

    Nucleus sampling (Holtzman et al. 2019, arXiv 1904.09751).
    """
    wanted = p * relative_weights(logits).sum(dtype=np.float64)
    for count in (256, 4096, len(logits)):  # the nucleus is usually small: sort no more than it needs
        head = logits if count >= len(logits) else logits[logits >= _kth_largest(logits, count)]
        head = np.sort(head)[::-1]
        mass = np.cumsum(relative_weights(head), dtype=np.float64)
        if mass[-1] >= wanted:
            break
    last = min(int(np.searchsorted(mass, wanted)), len(mass) - 1)
    return np.flatnonzero(logits >= max(head[last], LOWEST))


def min_p_positions(logits: np.ndarray, p: float) -> np.ndarray:
    """Positions, ascending, of logits [n] at least p times as likely as the most likely (arXiv 2407.01082)."""
    return np.flatnonzero(logits >= max(logits.max() + math.log(p), LOWEST))
