"""`ours.py ARTIFACT THREADS CONTEXT [BUDGET]`: the artifact in this project's runtime."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np
from worker import serve

from gemma3n_onnx.runtime import OnnxGemma3n


class Ours:
    def __init__(self, folder: str, threads: int, context: int, memory_budget: int | None = None) -> None:
        model = OnnxGemma3n.from_pretrained(folder, threads=threads, memory_budget=memory_budget, prefix_cache_size=0)
        self._engine = model.engine
        self._cache = self._engine.new_cache(1, context)
        self._decoder = self._engine.step_runner(self._cache)

    def run(self, ids: Sequence[int], new_tokens: int, made: Callable[[int], None]) -> None:
        self._cache.truncate(0, 0)
        logits = self._engine.prefill(self._cache, 0, list(ids))
        made(token := int(logits.argmax()))
        for _ in range(new_tokens - 1):
            made(token := int(self._decoder.step(np.array([token]), np.array([True])).argmax()))


serve(lambda: Ours(sys.argv[1], *map(int, sys.argv[2:])))
