"""Ends generated text before a stop string."""

from __future__ import annotations


class StopMatcher:
    """Passes text through up to the first completed stop string, however the text is split into pieces.

    A possible start of a stop string is held back. If the same character completes two stop strings, the
    text ends before the longer one. `matched` is the stop string found, or None.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """Text that precedes any stop string for certain; empty after a match."""
        if self.matched is not None:
            return ""
        text = self._held + piece
        starts = [(text.find(stop), stop) for stop in self._stop]
        found = [(start + len(stop), start, stop) for start, stop in starts if start >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        safe = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """The text held back; call it when no more text follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
