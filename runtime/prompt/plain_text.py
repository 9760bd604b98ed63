"""Control tokens that a user wrote into a message, kept apart from those of the chat template.

Text is hidden before a template sees it, and tokenized without special tokens afterwards. What stands between two
control tokens of the template is tokenized as a whole, as `split_special_tokens` of transformers' tokenizers does it.
"""

from __future__ import annotations

import re
import secrets

from .tokenizer import Tokenizer


class PlainText:
    """Hides the spellings of special tokens in text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._spellings = tokenizer.special_spellings
        self._pattern = re.compile("|".join(map(re.escape, sorted(self._spellings, key=len, reverse=True))))
        # Private-use characters around a number that nobody can guess: no text spells it.
        nonce = secrets.token_hex(8)
        self._mark = f"\ue000{nonce}:{{}}\ue001"
        self._hidden = re.compile(f"\ue000{nonce}:(\\d+)\ue001")

    def hide(self, text: str) -> str:
        return self._pattern.sub(lambda found: self._mark.format(self._spellings.index(found[0])), text)

    def show(self, text: str) -> str:
        """Undoes `hide`."""
        return self._hidden.sub(lambda found: self._spellings[int(found[1])], text)

    def encode(self, rendered: str) -> list[int]:
        """Token ids of a rendered prompt after one <bos>; hidden spellings become ordinary text."""
        if not self._hidden.search(rendered):
            return self._tokenizer.encode(rendered, add_bos=True)
        ids: list[int] = []
        start = 0
        for control in self._pattern.finditer(rendered):
            ids += self._encode_between(rendered[start : control.start()])
            ids.append(self._tokenizer.token_id(control[0]))
            start = control.end()
        ids += self._encode_between(rendered[start:])
        return ids if ids[:1] == [self._tokenizer.bos_id] else [self._tokenizer.bos_id, *ids]

    def _encode_between(self, text: str) -> list[int]:
        return self._tokenizer.encode(self.show(text), add_bos=False, special=not self._hidden.search(text))
