"""Token ids of a prompt, and the spans that encoder features fill."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class SoftTokenSpan:
    """`count` soft tokens from position `start` on: one image or clip.

    `features()` returns embeddings [count, H] fp32, and runs the encoder unless it `is_encoded`. Spans with equal `key`
    have equal features.
    """

    start: int
    count: int
    key: Hashable
    features: Callable[[], np.ndarray]
    is_encoded: bool = False

    @property
    def stop(self) -> int:
        return self.start + self.count

    def encoded(self) -> SoftTokenSpan:
        if self.is_encoded:
            return self
        features = self.features()
        return replace(self, features=lambda: features, is_encoded=True)


@dataclass(frozen=True)
class PromptTokens:
    """`warnings` say what the files of its images and clips lack."""

    ids: list[int]
    spans: tuple[SoftTokenSpan, ...] = ()
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def keys(self) -> list[Hashable]:
        """One key for each position: equal keys, equal embeddings."""
        keys: list[Hashable] = list(self.ids)
        for span in self.spans:
            for i in range(max(span.start, 0), span.stop):
                keys[i] = (span.key, i - span.start)
        return keys

    def encoded(self) -> PromptTokens:
        """A copy whose encoders have run."""
        return replace(self, spans=tuple(span.encoded() for span in self.spans))

    @property
    def is_encoded(self) -> bool:
        return all(span.is_encoded for span in self.spans)

    def after(self, count: int) -> PromptTokens:
        """The prompt without its first `count` tokens; a span that is cut starts at a negative position."""
        rest = (replace(span, start=span.start - count) for span in self.spans)
        return replace(self, ids=self.ids[count:], spans=tuple(span for span in rest if span.stop > 0))

    @property
    def end_of_spans(self) -> int:
        """The position after the last span, 0 without any."""
        return max((span.stop for span in self.spans), default=0)

    def split(self, positions: Iterable[int]) -> list[PromptTokens]:
        """Splits the prompt at the `positions` that lie within it."""
        borders = [0, *sorted({position for position in positions if 0 < position < len(self)}), len(self)]
        return [self.after(start)._first(stop - start) for start, stop in pairwise(borders)]

    def _first(self, count: int) -> PromptTokens:
        return replace(self, ids=self.ids[:count], spans=tuple(span for span in self.spans if span.start < count))


def shared_prefix(ours: Sequence[Hashable], theirs: Sequence[Hashable]) -> int:
    """Length of the longest common prefix."""
    differing = (i for i, (our, their) in enumerate(zip(ours, theirs)) if our != their)
    return next(differing, min(len(ours), len(theirs)))


def fill(
    rows: np.ndarray, first: int, spans: Sequence[SoftTokenSpan], features: Callable[[SoftTokenSpan], np.ndarray]
) -> None:
    """Overwrites rows [S, H], the prompt's positions from `first` on, with the features of spans.

    `features(span)` returns a span's [count, H] in the dtype of `rows`.
    """
    for span in spans:
        start, stop = max(span.start, first), min(span.stop, first + len(rows))
        if start < stop:
            rows[start - first : stop - first] = features(span)[start - span.start : stop - span.start]
