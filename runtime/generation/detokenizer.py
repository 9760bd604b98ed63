"""Incremental detokenization of generated tokens."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Protocol


class TokenDecoder(Protocol):
    """The part of `prompt.tokenizer.Tokenizer` that generation uses."""

    @property
    def special_ids(self) -> Set[int]: ...
    @property
    def byte_ids(self) -> Set[int]: ...
    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...


class IncrementalDetokenizer:
    """Decodes token ids as they arrive; the pieces concatenate to `TokenDecoder.decode` of all ids.

    Only byte tokens depend on their neighbours: a run of them decodes as a whole or, if it is not valid
    UTF-8, as one U+FFFD per byte. So a run is held until another token ends it, and every token is decoded
    once.
    """

    def __init__(self, tokenizer: TokenDecoder, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._byte_run: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty within a run of byte tokens."""
        if self._skip_special and token_id in self._tokenizer.special_ids:
            return ""
        if token_id in self._tokenizer.byte_ids:
            self._byte_run.append(token_id)
            return ""
        return self._take([token_id])

    def flush(self) -> str:
        """The text still held; call it when no more tokens follow."""
        return self._take([])

    def _take(self, ids: list[int]) -> str:
        run, self._byte_run = self._byte_run, []
        return self._tokenizer.decode(run + ids, self._skip_special)
