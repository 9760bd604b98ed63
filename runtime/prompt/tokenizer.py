"""Tokenizes text with an artifact's tokenizer.json."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers

from gemma3n_onnx.runtime.artifact import TOKENIZER_FILE
from gemma3n_onnx.runtime.checks import is_integer
from gemma3n_onnx.runtime.errors import ArtifactError, PromptError

BOS_TOKEN, EOS_TOKEN = "<bos>", "<eos>"


class Tokenizer:
    """An artifact's tokenizer.json."""

    def __init__(self, backend: tokenizers.Tokenizer, bos_token: str = BOS_TOKEN) -> None:
        """ArtifactError: the vocabulary lacks `bos_token`."""
        self._backend = backend
        self._one_mode = threading.Lock()
        """Held while text is encoded, because whether special tokens are recognized is a state of the backend."""
        self.bos_id = self.token_id(bos_token)
        special = {i: token.content for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self.special_ids = frozenset(special)
        self.special_spellings = tuple(special.values())
        byte_ids = {backend.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        self.bytes_by_id = {token_id: byte for token_id, byte in byte_ids.items() if token_id is not None}
        """The byte that each byte token stands for."""
        self.byte_ids = frozenset(self.bytes_by_id)

    @classmethod
    def from_folder(cls, folder: Path, bos_token: str = BOS_TOKEN) -> Self:
        """ArtifactError: the folder has no tokenizer.json, or one that cannot be read."""
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise ArtifactError(f"{path} is missing; export the model again.")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises a bare Exception
            raise ArtifactError(f"{path} is not a tokenizer ({error}); export the model again.") from error
        return cls(backend, bos_token)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: a text of n characters has at least n / longest_token tokens."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included; the model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def token_id(self, token: str) -> int:
        """The id of the token spelled `token`. ArtifactError: there is no such token."""
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise ArtifactError(f"The tokenizer has no token {token!r}; export the model again.")
        return token_id

    def encode(self, text: str, add_bos: bool, special: bool = True) -> list[int]:
        """Token ids of text; `add_bos` prepends <bos> if it is missing. Without `special`, the spelling of a special
        token is ordinary text.

        PromptError: the text is not valid Unicode.
        """
        try:
            with self._one_mode:
                self._backend.encode_special_tokens = not special
                # A batch, because a single text is encoded without releasing the interpreter lock.
                (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        except (TypeError, UnicodeError) as error:
            raise PromptError("The prompt contains a lone surrogate; give valid Unicode.") from error
        ids = encoding.ids
        return [self.bos_id, *ids] if add_bos and ids[:1] != [self.bos_id] else ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Decodes all ids at once; invalid bytes become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def token_text(self, token_id: int) -> str:
        """The text of a single token, as lists of log-probabilities have it; of a byte token `\\xe2`."""
        if (byte := self.bytes_by_id.get(token_id)) is not None:
            return f"\\x{byte:02x}"
        return self.decode([token_id], skip_special=False)


def encode_plain(prompt: str | Sequence[int] | np.ndarray, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Token ids of a text prompt, with one <bos> first, or checked ids in [0, vocab_size).

    PromptError: an empty prompt, another type, an id out of range.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError("The prompt is empty.")
        return tokenizer.encode(prompt, add_bos=True)
    if not isinstance(prompt, (list, tuple, np.ndarray)):
        raise PromptError(f"A prompt must be text, messages or token ids, not {type(prompt).__name__}.")
    if not len(prompt):
        raise PromptError("The prompt is empty.")
    return [_check_id(item, vocab_size) for item in prompt]


def _check_id(item: Any, vocab_size: int) -> int:
    if not is_integer(item) or not 0 <= item < vocab_size:
        raise PromptError(f"{item!r} is not a token id from 0 to {vocab_size - 1}.")
    return int(item)
