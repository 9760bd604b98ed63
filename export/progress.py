"""Progress of an export: its interface, and the terminal's implementation."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Protocol

from tqdm import tqdm

_PARTS = 4
# The mean speed since the start of the stage: that of the last moments depends on the tensor at hand.
_SMOOTHING = 0
_FORM = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


class ExportProgress(Protocol):
    """What an export reports: stages, and within a stage the work that is done, out of a total of any unit."""

    def stage(self, title: str) -> None: ...
    def total(self, work: float) -> None: ...
    def done(self, work: float) -> None: ...


class TerminalProgress:
    """Stages as lines on stderr, and work as a bar; if stderr is no terminal, as a line for each quarter. Silent if
    `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet, self._terminal = quiet, sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._total = self._done = 0.0

    def stage(self, title: str) -> None:
        self._close()
        self._title, self._total, self._done = title, 0.0, 0.0
        self._say(f"{title} ...")

    def total(self, work: float) -> None:
        self._close()
        self._total, self._done = work, 0.0
        if self._terminal and not self._quiet:
            self._bar = tqdm(total=work, desc=self._title, smoothing=_SMOOTHING, bar_format=_FORM)

    def done(self, work: float) -> None:
        before, self._done = self._done, self._done + work
        if self._bar is not None:
            self._bar.update(work)
        elif (part := self._parts(self._done)) > self._parts(before) and part < _PARTS:
            self._say(f"{self._title}: {100 * part // _PARTS} %")

    def steps(self, done: int, total: int) -> None:
        """Shows `done` of `total` steps of the stage."""
        if total != self._total:
            self.total(total)
        self.done(done - self._done)

    def _parts(self, work: float) -> int:
        return int(_PARTS * work / self._total) if self._total else 0

    def _say(self, line: str) -> None:
        if not self._quiet:
            print(line, file=sys.stderr, flush=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def __enter__(self) -> TerminalProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
