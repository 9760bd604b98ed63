"""`llama.py FILE THREADS CONTEXT`: a GGUF file in llama.cpp, called below its Python convenience."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import llama_cpp
import numpy as np
from worker import serve


class LlamaCpp:
    def __init__(self, file: str, threads: int, context: int) -> None:
        sizes = {"n_ctx": context, "n_batch": context}
        self._llama = llama_cpp.Llama(file, n_threads=threads, n_threads_batch=threads, verbose=False, **sizes)
        self._context, self._vocab = self._llama.ctx, self._llama.n_vocab()

    def run(self, ids: Sequence[int], new_tokens: int, made: Callable[[int], None]) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        made(token := self._after(ids))
        for _ in range(new_tokens - 1):
            made(token := self._after([token]))

    def _after(self, ids: Sequence[int]) -> int:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        code = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(tokens, len(ids)))
        if code:
            raise RuntimeError(f"llama_decode gave {code}")
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax())


serve(lambda: LlamaCpp(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
