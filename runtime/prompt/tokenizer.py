"""From messages or text to token ids, and from generated ids back to text as it arrives."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import jinja2
import numpy as np
import tokenizers
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gemma3n_onnx.runtime.errors import ArtifactError, PromptError

TOKENIZER_FILE = "tokenizer.json"


class Tokenizer:
    """Text to token ids and back, by an artifact's tokenizer.json."""

    def __init__(self, backend: tokenizers.Tokenizer, bos_token: str = "<bos>") -> None:
        """ArtifactError: the vocabulary lacks `bos_token`."""
        self._backend = backend
        self.bos_id = self.token_id(bos_token)
        self.special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        byte_ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self.byte_ids = frozenset(token_id for token_id in byte_ids if token_id is not None)

    @classmethod
    def from_folder(cls, folder: Path, bos_token: str = "<bos>") -> Self:
        """ArtifactError: the folder has no tokenizer.json, or one that cannot be read."""
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise ArtifactError(f"{path} is missing; export the model again.")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises the bare type
            raise ArtifactError(f"{path} is not a tokenizer ({error}); export the model again.") from error
        return cls(backend, bos_token)

    @property
    def vocab_size(self) -> int:
        """Tokens known, added ones included; the model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def token_id(self, token: str) -> int:
        """The id of a token by its spelling. ArtifactError: there is none."""
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise ArtifactError(f"The tokenizer has no token {token!r}; export the model again.")
        return token_id

    def encode(self, text: str, add_bos: bool) -> list[int]:
        """Token ids of text, special tokens in it too; `add_bos` puts one first if none is there.

        PromptError: the text is not valid Unicode.
        """
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError) as error:
            raise PromptError("The prompt holds a lone surrogate, which no text has; give valid Unicode.") from error
        return [self.bos_id, *ids] if add_bos and ids[:1] != [self.bos_id] else ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of all ids at once; bytes that form no character become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)


class IncrementalDetokenizer:
    """Text of token ids as they come; all its pieces together are `Tokenizer.decode` of all the ids.

    Only byte tokens depend on their neighbours: a run of them decodes as a whole or, if it is not valid
    UTF-8, as one U+FFFD a byte. So a run is held until another token ends it, and every token is decoded
    once.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
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
        """The text still held, when no token follows."""
        return self._take([])

    def _take(self, ids: list[int]) -> str:
        run, self._byte_run = self._byte_run, []
        return self._tokenizer.decode(run + ids, self._skip_special)


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
        """The text that is now sure to come before any stop string; empty after a match."""
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
        """The text held back, when no more follows: no stop string came of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins stop without being all of it."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


class _GenerationBlock(Extension):
    """`{% generation %}` marks what a model is trained on; for a prompt it is its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as text: jinja2's own filter escapes it for HTML."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


class ChatTemplate:
    """A checkpoint's chat template, in the dialect of Hugging Face: jinja2, sandboxed."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens`: the names that the template uses, such as {"bos_token": "<bos>"}.

        ArtifactError: the template is no valid jinja2.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ArtifactError(f"The chat template cannot be read ({error}); export the model again.") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Prompt text of messages as `MessageReader.read` gives them; by default up to the model's turn.

        PromptError: the template refuses them, for instance because roles do not alternate.
        """
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except Exception as error:  # a template can raise whatever its expressions can
            reason = re.sub(r"\s+", " ", str(error)).strip().rstrip(".")
            raise PromptError(f"The chat template refuses these messages: {reason}.") from error


def encode_plain(prompt: str | Sequence[int] | np.ndarray, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Token ids of a prompt without messages: text (after one <bos>), or ids in [0, vocab_size).

    PromptError: an empty prompt, another type, an id out of range.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError("The prompt is empty.")
        return tokenizer.encode(prompt, add_bos=True)
    if not isinstance(prompt, (list, tuple, np.ndarray)):
        raise PromptError(f"A prompt is text, messages or token ids, not {type(prompt).__name__}.")
    if not len(prompt):
        raise PromptError("The prompt is empty.")
    return [_check_id(item, vocab_size) for item in prompt]


def _check_id(item: Any, vocab_size: int) -> int:
    if isinstance(item, bool) or not isinstance(item, (int, np.integer)) or not 0 <= item < vocab_size:
        raise PromptError(f"{item!r} is not a token id from 0 to {vocab_size - 1}.")
    return int(item)
