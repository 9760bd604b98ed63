"""Prefix cache: reuses the KV cache of a prefix shared with an earlier prompt.

Any prefix of a full-attention cache is the cache of a shorter prompt. Windowed caches drop old positions, so they are
copied at the ends of some prefill chunks, more sparsely away from both ends of the prompt. A chunk also ends where a
prompt diverges from an earlier one, so that a third prompt finds a copy there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from gemma3n_onnx.runtime.tokens import PromptTokens, shared_prefix

from .engine import Engine
from .kv_cache import KVCache

WORTH_SHARING = 32
"""Minimum shared tokens for a separate prefill chunk, or for joining a row that another conversation may continue."""


@dataclass
class PrefixEntry:
    """A prompt's token `keys`, its KV `cache`, and copies of the windowed caches by length."""

    keys: list[Hashable]
    cache: KVCache
    windows: dict[int, list[np.ndarray]] = field(default_factory=dict)
    shared: int = 0
    """Length of the prefix shared with an earlier prompt: others are likely to diverge there."""

    def remember(self, tokens: int) -> None:
        """Call when the first `tokens` are in the cache, in ascending order."""
        self.windows[tokens] = self.cache.copy_windows()
        for position in _superfluous(sorted(self.windows)):
            if position != self.shared:
                del self.windows[position]

    def usable(self, keys: Sequence[Hashable]) -> int:
        """The largest remembered position up to which `keys` match."""
        shared = shared_prefix(self.keys, keys)
        return max((position for position in self.windows if position <= shared), default=0)


class PrefixCache:
    """The KV caches of the last `limit` prompts."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: list[PrefixEntry] = []

    def usable(self, keys: Sequence[Hashable]) -> int:
        """How many tokens of a prompt `begin` would copy."""
        return max((kept.usable(keys[:-1]) for kept in self._kept), default=0)

    def begin(self, keys: list[Hashable], cache: KVCache) -> PrefixEntry:
        """Copies the longest cached prefix of a prompt into `cache`, of one row, and returns the prompt's entry. At
        least one token is left to prefill."""
        shared = max((shared_prefix(kept.keys, keys[:-1]) for kept in self._kept), default=0)
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
        """Prefills the `rest` of a prompt and keeps its entry; returns the logits [V] after the last token.

        A chunk ends after the last image or clip, because the question that follows is likely to change. `after_chunk`
        as in `Engine.prefill`.
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
        """Adds a prefilled prompt; it replaces the entries that are prefixes of it."""
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
    """The ascending positions that can be dropped. The others are dense near the end, where a conversation continues,
    and near the start, which other prompts may share: distances at least double away from both."""
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
