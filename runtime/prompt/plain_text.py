"""Control tokens that a user wrote into a message, kept apart from those of the chat template.

Text is hidden before a template sees it, and tokenized without special tokens afterwards. What stands between two
control tokens of the template is tokenized as a whole, as `split_special_tokens` of transformers' tokenizers does it.

The characters that special tokens begin with are hidden, wherever they stand, so that no template can put a token
together from pieces of text.
"""

from __future__ import annotations

import re
import secrets
from typing import Any

from gemma3n_onnx.runtime.errors import PromptError

from .tokenizer import Tokenizer


class PlainText:
    """Hides the first characters of special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        spellings = sorted(tokenizer.special_spellings, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, spellings)))
        firsts = sorted({spelling[0] for spelling in spellings})
        # A random mark, which no text holds by chance. If one did, it would become another character, never a token.
        nonce = secrets.token_hex(4)
        self._marks = {char: f"\ue000{nonce}{number}\ue001" for number, char in enumerate(firsts)}
        self._shown = {mark: char for char, mark in self._marks.items()}
        self._first = re.compile("|".join(map(re.escape, firsts)))
        self._hidden = re.compile("|".join(map(re.escape, self._shown)))

    def hide(self, text: str) -> str:
        return self._first.sub(lambda found: self._marks[found[0]], text)

    def hide_all(self, value: Any) -> Any:
        """Hides in every string of a JSON value, keys included. PromptError: it nests too deeply."""
        try:
            return self._hide_all(value)
        except RecursionError as error:
            raise PromptError("A value for the chat template nests too deeply; send a flatter one.") from error

    def _hide_all(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, dict):
            return {self.hide(str(key)): self._hide_all(each) for key, each in value.items()}
        return [self._hide_all(each) for each in value] if isinstance(value, list | tuple) else value

    def show(self, text: str) -> str:
        """Undoes `hide`."""
        return self._hidden.sub(lambda found: self._shown[found[0]], text)

    def encode(self, rendered: str) -> list[int]:
        """Token ids of a rendered prompt after one <bos>; hidden text stays ordinary text."""
        if not self._hidden.search(rendered):
            return self._tokenizer.encode(rendered, add_bos=True)
        ids: list[int] = []
        start = 0
        for control in self._control.finditer(rendered):
            ids += self._encode_between(rendered[start : control.start()])
            ids.append(self._tokenizer.token_id(control[0]))
            start = control.end()
        ids += self._encode_between(rendered[start:])
        return ids if ids[:1] == [self._tokenizer.bos_id] else [self._tokenizer.bos_id, *ids]

    def _encode_between(self, text: str) -> list[int]:
        return self._tokenizer.encode(self.show(text), add_bos=False, special=False)
