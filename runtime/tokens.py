"""Token ids of a prompt, and the places in it that an encoder's features take."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Slot:
    """`count` soft tokens from position `start` on: one image or clip.

    `features()` gives their embeddings [count, H] fp32, running the encoder. Slots of equal `key` have equal
    features.
    """

    start: int
    count: int
    key: Hashable
    features: Callable[[], np.ndarray]

    @property
    def stop(self) -> int:
        return self.start + self.count

    def encoded(self) -> Slot:
        features = self.features()
        return replace(self, features=lambda: features)


@dataclass(frozen=True)
class PromptTokens:
    ids: list[int]
    slots: tuple[Slot, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def keys(self) -> list[Hashable]:
        """For each position what its embedding follows from: equal keys, equal embeddings."""
        keys: list[Hashable] = list(self.ids)
        for slot in self.slots:
            for i in range(max(slot.start, 0), slot.stop):
                keys[i] = (slot.key, i - slot.start)
        return keys

    def encoded(self) -> PromptTokens:
        """The same, the encoders run."""
        return PromptTokens(self.ids, tuple(slot.encoded() for slot in self.slots))

    def after(self, count: int) -> PromptTokens:
        """The prompt without its first `count` tokens; a slot that they cut begins before the rest."""
        rest = (replace(slot, start=slot.start - count) for slot in self.slots)
        return PromptTokens(self.ids[count:], tuple(slot for slot in rest if slot.stop > 0))

    @property
    def end_of_slots(self) -> int:
        """The position after the last slot, 0 without any."""
        return max((slot.stop for slot in self.slots), default=0)

    def split(self, positions: Iterable[int]) -> list[PromptTokens]:
        """The prompt in parts that end at those of `positions` that lie within it."""
        borders = [0, *sorted({position for position in positions if 0 < position < len(self)}), len(self)]
        return [self.after(start)._first(stop - start) for start, stop in pairwise(borders)]

    def _first(self, count: int) -> PromptTokens:
        return PromptTokens(self.ids[:count], tuple(slot for slot in self.slots if slot.start < count))


def fill(rows: np.ndarray, first: int, slots: Sequence[Slot], features: Callable[[Slot], np.ndarray]) -> None:
    """Overwrites rows [S, H], which begin at position `first` of a prompt, where slots lie.

    `features(slot)` gives a slot's [count, H] in the dtype of `rows`.
    """
    for slot in slots:
        start, stop = max(slot.start, first), min(slot.stop, first + len(rows))
        if start < stop:
            rows[start - first : stop - first] = features(slot)[start - slot.start : stop - slot.start]
