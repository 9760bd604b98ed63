"""What a long training says while it runs."""

from __future__ import annotations

import sys
import time


class Progress:
    """A line for every stage, and on a terminal a line that counts its steps."""

    def __init__(self) -> None:
        self._begin = self._stage_begin = time.monotonic()

    def stage(self, title: str) -> None:
        self._stage_begin = time.monotonic()
        self._show(f"[{self._stage_begin - self._begin:5.0f} s] {title}", end="\n")

    def step(self, done: int, total: int, loss: float) -> None:
        if sys.stderr.isatty() or done % 50 == 0 or done == total:
            end = "\n" if not sys.stderr.isatty() or done == total else "\r"
            self._show(f"  {done:>5} / {total}  loss {loss:.3f}  {time.monotonic() - self._stage_begin:.0f} s", end=end)

    def _show(self, text: str, end: str) -> None:
        print(text, end=end, file=sys.stderr, flush=True)
