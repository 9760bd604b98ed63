"""The text of one sequence as its tokens arrive."""

from __future__ import annotations

from .detokenizer import IncrementalDetokenizer, TokenDecoder
from .stop_strings import StopMatcher


class TextAssembler:
    """Detokenizes tokens, and ends the text before a stop string."""

    def __init__(self, tokenizer: TokenDecoder, stop: tuple[str, ...]) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._matcher = StopMatcher(stop)

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text."""
        return self._matcher.matched

    def push(self, token_id: int | None, finish_reason: str | None) -> tuple[str, str | None]:
        """The text that the token completes, and the finish reason: `finish_reason`, or "stop" at a stop
        string. None is a token without text."""
        piece = self._matcher.push("" if token_id is None else self._detokenizer.push(token_id))
        if finish_reason and self._matcher.matched is None:
            piece += self._matcher.push(self._detokenizer.flush())
            if self._matcher.matched is None:
                piece += self._matcher.flush()
        return piece, "stop" if self._matcher.matched is not None else finish_reason
