"""What the media of one request may take, and whether anybody still waits for them.

A server activates a budget in the thread that reads a request. Elsewhere none is active, and nothing is limited beyond
the limits of each source.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any

from gemma3n_onnx.runtime.errors import DeadlineError, Gemma3nError, MediaError

URL_SCHEMES = ("http:", "https:")


class MediaCancelledError(Gemma3nError):
    """Nobody waits for the media any more."""


@dataclass(frozen=True)
class MediaLimits:
    """Of all media of a request together.

    Attributes:
        sources: pictures, clips and videos.
        urls: those of them that are fetched.
        size_bytes: of their files.
        pixels: of the pictures and of the frames of videos that are used, as they are stored.
        frames: of videos.
        seconds: of sound and videos.
    """

    sources: float = 32
    urls: float = 16
    size_bytes: float = 128e6
    pixels: float = 400e6
    frames: float = 128
    seconds: float = 3600


UNLIMITED = MediaLimits(*[math.inf] * len(fields(MediaLimits)))


UNITS = {
    "sources": "images, clips and videos",
    "urls": "media URLs",
    "size_bytes": "bytes of media",
    "pixels": "pixels",
    "frames": "video frames",
    "seconds": "seconds of sound and video",
}


class MediaBudget:
    """`deadline` is a time of `time.monotonic`. One thread spends; any may cancel."""

    def __init__(self, limits: MediaLimits = UNLIMITED, deadline: float = math.inf) -> None:
        self.limits, self.deadline = limits, deadline
        self._spent = dict.fromkeys(UNITS, 0.0)
        self._cancelled = False
        self._lock = threading.Lock()
        self._interrupts: list[Callable[[], None]] = []

    @contextmanager
    def active(self) -> Iterator[None]:
        """Makes this the budget of the current context."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    def check(self) -> None:
        """Raises MediaCancelledError or DeadlineError if the work is to end."""
        if self._cancelled:
            raise MediaCancelledError("The request was cancelled.")
        if time.monotonic() > self.deadline:
            raise DeadlineError("Reading the media took longer than this server allows; send fewer or smaller ones.")

    def spend(self, what: str, amount: float) -> None:
        """Adds to a total, named as in `MediaLimits`. MediaError: it exceeds the limit. Else raises as `check`."""
        self.check()
        self._spent[what] += amount
        if self._spent[what] > (most := getattr(self.limits, what)):
            raise MediaError(
                f"The request has more than the {most:,.16g} {UNITS[what]} that this server takes; send less at once."
            )

    def left(self, what: str) -> float:
        return getattr(self.limits, what) - self._spent[what]

    def count(self, sources: Sequence[Any]) -> None:
        """Spends what is known of sources before any is read."""
        self.spend("sources", len(sources))
        self.spend("urls", sum(map(_is_url, sources)))

    def cancel(self) -> None:
        """Ends the work at its next check, and interrupts what it waits for."""
        with self._lock:
            self._cancelled = True
            for interrupt in self._interrupts:
                interrupt()

    @contextmanager
    def interruptible(self, interrupt: Callable[[], None]) -> Iterator[None]:
        """In this context, `cancel` calls `interrupt`."""
        with self._lock:
            self._interrupts.append(interrupt)
        try:
            self.check()
            yield
        finally:
            with self._lock:
                self._interrupts.remove(interrupt)


_active: ContextVar[MediaBudget | None] = ContextVar("media_budget", default=None)


def current_budget() -> MediaBudget:
    """The active budget, or one without limits."""
    return _active.get() or MediaBudget()


def _is_url(source: Any) -> bool:
    return isinstance(source, str) and source.lstrip()[:6].lower().startswith(URL_SCHEMES)
