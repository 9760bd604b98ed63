"""Ends generated text before a stop string."""

from __future__ import annotations


class StopMatcher:
    """Passes text on up to the first stop string to be completed, however the text is cut into pieces.

    What could be the beginning of a stop string is held back. Where two are completed by the same
    character, the text ends before the longer one. `matched` is the stop string that was met, or None.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """Text that certainly precedes any stop string; empty after a match."""
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
    """Length of the longest end of text that begins stop without being all of it."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
