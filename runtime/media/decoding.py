"""The memory that decoders take at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from gemma3n_onnx.runtime.errors import MediaError

from .budget import current_budget

LIMIT_BYTES = 1_000_000_000
POLL_SECONDS = 0.1


class DecodingMemory:
    """Limits the bytes that all decoders take together, and how many of them run."""

    def __init__(self, limit_bytes: int = LIMIT_BYTES, at_once: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self._slots = at_once or max(2, (os.cpu_count() or 2) // 2)
        self._free = limit_bytes
        self._changed = threading.Condition()

    @contextmanager
    def reserved(self, needed: int, advice: str) -> Iterator[None]:
        """Waits until `needed` bytes are free, and holds them in this context.

        Raises MediaError, which ends with `advice`, if they never will be; while it waits, as `MediaBudget.check`.
        """
        if needed > self.limit_bytes:
            raise MediaError(
                f"Decoding takes {needed / 1e6:,.0f} MB of memory, and {self.limit_bytes / 1e6:,.0f} MB are allowed; "
                f"{advice}."
            )
        budget = current_budget()
        with self._changed:
            while self._slots == 0 or self._free < needed:
                self._changed.wait(POLL_SECONDS)
                budget.check()
            self._slots -= 1
            self._free -= needed
        try:
            yield
        finally:
            with self._changed:
                self._slots += 1
                self._free += needed
                self._changed.notify_all()
