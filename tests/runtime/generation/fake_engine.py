"""An engine without a model: scripted logits over a vocabulary of letters."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np

from gemma3n_onnx.runtime.engine.scorer import TokenScores

END = 1
FIRST_LETTER = 4
VOCABULARY = FIRST_LETTER + len(string.ascii_lowercase)

Script = Callable[[Sequence[int]], int | np.ndarray]


def ids_of(text: str) -> list[int]:
    return [FIRST_LETTER + string.ascii_lowercase.index(letter) for letter in text]


class FakeTokenizer:
    """A token is a letter."""

    special_ids = frozenset(range(FIRST_LETTER))
    byte_ids: frozenset[int] = frozenset()

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return "".join(string.ascii_lowercase[i - FIRST_LETTER] for i in ids if i >= FIRST_LETTER)


class FakeCache:
    """Remembers tokens instead of keys and values."""

    has_windows = False

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self.lengths = np.zeros(rows, dtype=np.int64)
        self.tokens: list[list[int]] = [[] for _ in range(rows)]

    def append(self, row: int, ids: Sequence[int]) -> None:
        self.tokens[row] = [*self.tokens[row][: int(self.lengths[row])], *ids]
        self.lengths[row] += len(ids)
        assert self.lengths[row] <= self.capacity

    def truncate(self, row: int, length: int) -> bool:
        self.lengths[row] = length
        return True

    def copy_windows(self) -> list[np.ndarray]:
        return []

    def fill_from(self, other: FakeCache, tokens: int, windows: list[np.ndarray]) -> None:
        self.lengths[:] = 0
        self.append(0, other.tokens[0][:tokens])

    def fill_row(self, row: int, other: FakeCache) -> None:
        self.lengths[row] = 0
        self.append(row, other.tokens[0][: int(other.lengths[0])])


class FakeEngine:
    """`script` gives the next token, or logits [V], after the tokens of a row. `log` lists what ran: ("prefill", ids)
    for each chunk, and for each step its kind and the active rows."""

    def __init__(self, script: Script, *, chunk: int = 4, host_memory: bool = True, candidates: bool = False) -> None:
        self.manifest = SimpleNamespace(eos_token_ids=(END,), pad_token_id=0)
        self.provider = SimpleNamespace(host_memory=host_memory)
        self.has_candidates = candidates
        self.log: list[tuple] = []
        self._script, self._chunk = script, chunk
        self._cache: FakeCache | None = None

    def new_cache(self, rows: int, capacity: int) -> FakeCache:
        return FakeCache(rows, capacity)

    def prefill(self, cache, row, ids, spans=(), after_chunk=None) -> np.ndarray:
        for span in spans:
            span.features()
        for start in range(0, len(ids), self._chunk):
            chunk = ids[start : start + self._chunk]
            cache.append(row, chunk)
            self.log.append(("prefill", chunk))
            if after_chunk is not None:
                after_chunk(int(cache.lengths[row]))
        return self._logits(cache, row)

    def score(self, prompt, first, *, and_next=False, after_chunk=None) -> TokenScores:
        for span in prompt.spans:
            span.features()
        places = range(first, len(prompt) + and_next)
        for start in places[:: self._chunk]:
            self.log.append(("score", prompt.ids[start - 1 : min(start - 1 + self._chunk, places.stop - 1)]))
            if after_chunk is not None:
                after_chunk(start)
        logits = np.array([self._logits_after(prompt.ids[:place]) for place in places]).reshape(-1, VOCABULARY)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        top = np.argsort(-logprobs, axis=1, kind="stable")[:, :5]
        targets = [*prompt.ids[first:], *([0] if and_next else [])]
        picked = logprobs[np.arange(len(targets)), targets]
        return TokenScores(picked, np.take_along_axis(logprobs, top, 1), top)

    def step_runner(self, cache: FakeCache, rows: int) -> FakeEngine:
        self._cache = cache
        return self

    def step(self, tokens: np.ndarray, active: np.ndarray, kind: str = "step") -> np.ndarray:
        cache = self._cache
        assert cache is not None
        self.log.append((kind, [*np.flatnonzero(active).tolist()]))
        for row, token in enumerate(tokens.tolist()):
            if active[row]:
                cache.append(row, [token])
            elif self.provider.host_memory:
                cache.tokens[row] = [0] * len(cache.tokens[row])  # its windows have moved
            else:
                cache.tokens[row] = [*cache.tokens[row][: int(cache.lengths[row])], token]  # past its end
        return np.stack([self._logits(cache, row) for row in range(len(tokens))])

    def step_greedy(self, tokens: np.ndarray, active: np.ndarray) -> np.ndarray:
        return self.step(tokens, active, "greedy").argmax(-1)

    def step_candidates(self, tokens: np.ndarray, active: np.ndarray, count: int) -> list[tuple]:
        logits = self.step(tokens, active, f"{count} candidates")
        best = np.sort(np.argsort(-logits, axis=1, kind="stable")[:, :count], axis=1)
        return [(ids, row[ids]) for ids, row in zip(best, logits)]

    def _logits(self, cache: FakeCache, row: int) -> np.ndarray:
        return self._logits_after(cache.tokens[row][: int(cache.lengths[row])])

    def _logits_after(self, tokens: Sequence[int]) -> np.ndarray:
        given = self._script(tokens) if tokens else np.zeros(VOCABULARY, dtype=np.float32)  # an idle row
        if isinstance(given, np.ndarray):
            return given
        logits = np.zeros(VOCABULARY, dtype=np.float32)
        logits[given] = 20
        return logits
