"""Structured output: logits processors of JSON schemas, by llguidance."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from gemma3n_onnx.runtime.artifact import Manifest
from gemma3n_onnx.runtime.errors import OptionError
from gemma3n_onnx.runtime.generation.logits_processors import LogitsProcessor
from gemma3n_onnx.runtime.prompt.tokenizer import TOKENIZER_FILE

ANY_OBJECT = {"type": "object"}
_END_OF_TURN = "<end_of_turn>"


class Grammars:
    """Grammars over the tokenizer of one artifact, which is read on first use."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest

    def json_of(self, schema: Mapping[str, Any]) -> Callable[[], LogitsProcessor]:
        """Factory of a per-sequence logits processor that allows only compact JSON that matches `schema`.

        Raises:
            OptionError: the schema is invalid, or uses keywords that llguidance does not support.
        """
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})
        except (TypeError, ValueError) as error:
            raise OptionError(f"This JSON schema is not supported: {_line(error)}.") from error
        if told := LLMatcher.validate_grammar(grammar, self._tokenizer):
            raise OptionError(f"This JSON schema is not supported: {_line(told)}.")
        return lambda: _Grammar(LLMatcher(self._tokenizer, grammar), self._tokenizer.eos_token)

    @functools.cached_property
    def _tokenizer(self) -> LLTokenizer:
        text = (self._folder / TOKENIZER_FILE).read_text(encoding="utf-8")
        ids = {token["content"]: token["id"] for token in json.loads(text)["added_tokens"]}
        end = ids.get(_END_OF_TURN, self._manifest.eos_token_ids[0])
        end = end if end in self._manifest.eos_token_ids else self._manifest.eos_token_ids[0]
        return LLTokenizer(text, n_vocab=self._manifest.vocab_size, eos_token=end)


class _Grammar(LogitsProcessor):
    def __init__(self, matcher: LLMatcher, eos: int) -> None:
        self._matcher, self._eos = matcher, eos

    def process(self, logits: np.ndarray) -> np.ndarray:
        allowed = np.full_like(logits, -np.inf)
        if self._matcher.is_stopped():
            allowed[self._eos] = logits[self._eos]
            return allowed
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        may = np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool)
        allowed[: len(may)][may] = logits[: len(may)][may]
        return allowed

    def accept(self, token: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


def _line(error: object) -> str:
    return " ".join(str(error).split()).rstrip(".")[:300]
