"""Progress of an export: its interface, and the terminal's implementation."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Protocol

from tqdm import tqdm


class ExportProgress(Protocol):
    """What an export reports."""

    def stage(self, title: str) -> None: ...
    def bytes_total(self, total: int) -> None: ...
    def bytes_done(self, count: int) -> None: ...


class TerminalProgress:
    """Stages as lines and bytes as a bar on stderr; silent if `quiet` or if stderr is not a terminal."""

    def __init__(self, quiet: bool = False) -> None:
        self._shown = sys.stderr.isatty() and not quiet
        self._bar: tqdm | None = None

    def stage(self, title: str) -> None:
        self._title = title
        if self._shown:
            print(f"{title} ...", file=sys.stderr)

    def bytes_total(self, total: int) -> None:
        self._close()
        self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=self._title, disable=not self._shown)

    def bytes_done(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def steps(self, done: int, total: int) -> None:
        """Shows `done` of `total` steps of the stage."""
        if self._bar is None or self._bar.total != total:
            self._close()
            self._bar = tqdm(total=total, desc=self._title, disable=not self._shown)
        self._bar.update(done - self._bar.n)

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
