"""KV caches of earlier prompts, so that what a new prompt begins with alike is not run again.

Full-length caches are appended to, so any beginning of them is that of a shorter prompt. Windowed caches drop what
leaves the window: they are copied at some positions on the way, the ends of prefill chunks, which lie the further
apart the further they are from both ends of the prompt. Where two prompts part, a chunk of the second one ends, so that
the third finds a copy there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from gemma3n_onnx.runtime.tokens import PromptTokens

from .engine import Engine
from .kv_cache import KVCache

WORTH_SHARING = 32
"""Tokens that a chunk of their own does not cost more time than it will save."""


@dataclass
class PrefixEntry:
    """`keys` of a prompt's tokens, the `cache` that it was run into, and copies of its windowed caches by the number of
    tokens that they had seen."""

    keys: list[Hashable]
    cache: KVCache
    windows: dict[int, list[np.ndarray]] = field(default_factory=dict)
    shared: int = 0
    """Tokens that it begins with as some earlier prompt does: where other prompts are likely to part from it."""

    def remember(self, tokens: int) -> None:
        """To be called when the first `tokens` are in the cache, in rising order."""
        self.windows[tokens] = self.cache.copy_windows()
        for position in _superfluous(sorted(self.windows)):
            if position != self.shared:
                del self.windows[position]

    def usable(self, keys: Sequence[Hashable]) -> int:
        """The largest remembered position up to which `keys` are the same."""
        shared = self.shared_with(keys)
        return max((position for position in self.windows if position <= shared), default=0)

    def shared_with(self, keys: Sequence[Hashable]) -> int:
        """How many of the first keys are the same."""
        differing = (i for i, (ours, theirs) in enumerate(zip(self.keys, keys)) if ours != theirs)
        return next(differing, min(len(self.keys), len(keys)))


class PrefixCache:
    """The last `limit` prompts that were run, at least one, the newest last."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: list[PrefixEntry] = []

    def begin(self, keys: list[Hashable], cache: KVCache) -> PrefixEntry:
        """A prompt that is going to be run into `cache`, of one row, which is filled with the longest beginning of it
        that is kept. At least one token is left to be run."""
        shared = max((kept.shared_with(keys[:-1]) for kept in self._kept), default=0)
        best = max(self._kept, key=lambda kept: kept.usable(keys[:-1]), default=None)
        tokens = 0 if best is None else best.usable(keys[:-1])
        shared = shared if shared - tokens >= WORTH_SHARING else 0
        if best is None or not tokens:
            return PrefixEntry(keys, cache, shared=shared)
        cache.fill_from(best.cache, tokens, best.windows[tokens])
        windows = {at: windows for at, windows in best.windows.items() if at <= tokens}
        return PrefixEntry(keys, cache, windows, shared)

    def run(
        self, engine: Engine, prompt: PrefixEntry, rest: PromptTokens, after_chunk: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Runs what follows the tokens that the cache of `prompt` already has, and keeps it; logits [V] after the last.

        Images and clips come before the question as a rule, so that a chunk ends behind them: what follows them is
        likely to change. `after_chunk` as of `Engine.prefill`.
        """

        def remember(tokens: int) -> None:
            prompt.remember(tokens)
            if after_chunk is not None:
                after_chunk(tokens)

        done = int(prompt.cache.lengths[0])
        for part in rest.split((rest.end_of_spans, prompt.shared - done)):
            logits = engine.prefill(prompt.cache, 0, part.ids, part.spans, remember)
        self.keep(prompt)
        return logits

    def keep(self, prompt: PrefixEntry) -> None:
        """To be called when the prompt has been run. It takes the places of those that it begins with."""
        rest = [kept for kept in self._kept if prompt.keys[: len(kept.keys)] != kept.keys]
        self._kept = [*rest, prompt][-self.limit :]

    def clear(self) -> None:
        self._kept = []

    @property
    def nbytes(self) -> int:
        return sum(
            kept.cache.nbytes + sum(part.nbytes for parts in kept.windows.values() for part in parts)
            for kept in self._kept
        )


def _superfluous(positions: Sequence[int]) -> list[int]:
    """Of rising positions those that can go. The others lie the closer the nearer they are to the end, where a
    conversation goes on, or to the beginning, which other prompts may share: their distances at least double."""
    last, from_end, from_start = positions[-1], 0, 0
    needed = {last}
    for position in reversed(positions[:-1]):
        if last - position >= 2 * from_end:
            from_end = last - position
            needed.add(position)
    for position in positions:
        if position >= 2 * from_start:
            from_start = position
            needed.add(position)
    return [position for position in positions if position not in needed]
