"""Constrained answers: logits processors of JSON schemas, patterns, choices and grammars, by llguidance."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from gemma3n_onnx.runtime.artifact import TOKENIZER_FILE, Manifest, verify_checksums
from gemma3n_onnx.runtime.errors import AnswerSchemaError, OptionError
from gemma3n_onnx.runtime.generation.logits_processors import LogitsProcessor

from .deep_stack import with_deep_stack
from .json_schema import Prepared, prepare
from .patterns import Pattern

ANY_OBJECT = {"type": "object"}
_END_OF_TURN = "<end_of_turn>"
_CONTROL_CHARACTER = re.compile(r"\\u00[01]|\x7f")  # in JSON
_MAX_GRAMMAR = 32 * 1024  # characters; llguidance follows chains of rules recursively
_MAX_RULES = 500
_MAX_CHOICES = 10_000
_MAX_CHOICE_CHARACTERS = 50_000
_STEPS = 4  # llguidance meets some of its limits only after the first tokens
_LIMITS = LLParserLimits(verbose_errors=False)
_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&~-]")  # in a regular expression
_RULE = re.compile(r"^[ \t]*[?!]?[\w-][^:\n]*:", re.MULTILINE)
_GBNF_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)")
_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
_HINTS = {
    "not disjoint": "write patterns that cannot match the same name",
    "nsatisfiable": "remove one of the keywords that contradict each other",
    "Regex is empty": "remove one of the keywords that contradict each other",
    "too large": "send a smaller one",
    "too big": "send a smaller one",
    "items; max": "send a smaller one, or require more of its properties",
}


@dataclass(frozen=True)
class Constraint:
    """`processor`: factory of a per-sequence logits processor. `check`: raises AnswerSchemaError if a finished answer
    breaks what the processor cannot enforce; None if it enforces everything."""

    processor: Callable[[], LogitsProcessor]
    check: Callable[[str], None] | None = None


class Grammars:
    """Grammars over the tokenizer of one artifact, which is read on first use."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest

    def json_of(self, schema: Any) -> Constraint:
        """Compact JSON that matches `schema`.

        Raises:
            OptionError: the schema is invalid, matches nothing, or can be neither enforced nor checked.
        """
        prepared = prepare(schema)
        try:
            processor = self._processor(_json_grammar(prepared), "This JSON schema")
        except _PropertiesCountedError:
            prepared = prepare(schema, counts_properties=False)
            processor = self._processor(_json_grammar(prepared), "This JSON schema")
        return Constraint(processor, functools.partial(_check_json, prepared) if prepared.unenforced else None)

    def regex_of(self, pattern: str) -> Constraint:
        """Text that `pattern` matches as a whole.

        Raises:
            OptionError: the pattern is invalid, matches nothing, or is not supported.
        """
        try:
            whole = Pattern(pattern, whole=True)
        except OptionError as error:
            raise OptionError(f"This regular expression is not supported: {error}.") from error
        processor = self._processor(whole.grammar(), "This regular expression")
        return Constraint(processor, functools.partial(_check_pattern, whole) if whole.has_look else None)

    def choice_of(self, texts: Sequence[str]) -> Constraint:
        """One of `texts`.

        Raises:
            OptionError: there are none or too many.
        """
        if not texts or not all(isinstance(text, str) and text for text in texts) or len(texts) > _MAX_CHOICES:
            raise OptionError(f"A choice needs between 1 and {_MAX_CHOICES} texts that are not empty.")
        if sum(map(len, texts)) > _MAX_CHOICE_CHARACTERS:
            raise OptionError(
                f"A choice has at most {_MAX_CHOICE_CHARACTERS:,} characters; send fewer or shorter texts."
            )
        pattern = "|".join(_SPECIAL.sub(r"\\\g<0>", text) for text in texts)
        return Constraint(self._processor(LLMatcher.grammar_from_regex(pattern), "This choice"))

    def lark_of(self, text: str) -> Constraint:
        """Text of a grammar in llguidance's variant of Lark, or in llama.cpp's GBNF.

        Raises:
            OptionError: the grammar is invalid, too large, or matches nothing.
        """
        if len(text) > _MAX_GRAMMAR or len(_RULE.findall(text)) > _MAX_RULES:
            raise OptionError(
                f"A grammar may have {_MAX_RULES} rules and {_MAX_GRAMMAR} characters; send a smaller one."
            )
        try:
            lark = gbnf_to_lark(_GBNF_ESCAPE.sub(_unescaped, text)) if _GBNF_RULE.search(text) else text
        except Exception as error:  # it raises what Python raises on malformed text, RecursionError included
            raise OptionError(f"This GBNF grammar is not supported: {_line(error)}; mend this rule.") from error
        return Constraint(self._processor(LLMatcher.grammar_from_lark(lark), "This grammar"))

    def _processor(self, grammar: str, what: str) -> Callable[[], LogitsProcessor]:
        """Raises OptionError if the grammar is invalid, too complex, or matches nothing."""
        matcher = with_deep_stack(functools.partial(self._compile, grammar, what))
        return lambda: _Grammar(matcher.deep_copy(), self._tokenizer.eos_token)

    def _compile(self, grammar: str, what: str) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise _not_supported(what, matcher.get_error())
        self._try(matcher.deep_copy(), what)
        return matcher

    def _try(self, matcher: LLMatcher, what: str) -> None:
        """Takes a few steps; raises OptionError if they fail."""
        for _ in range(_STEPS):
            bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            if matcher.is_error():
                raise _not_supported(what, matcher.get_error())
            allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
            if matcher.is_stopped() or not len(allowed):
                if not matcher.is_accepting():
                    raise OptionError(f"{what} matches nothing; remove what contradicts itself.")
                return
            matcher.consume_token(int(allowed[0]))

    @functools.cached_property
    def _tokenizer(self) -> LLTokenizer:
        verify_checksums(self._folder, self._manifest, names=(TOKENIZER_FILE,))
        text = (self._folder / TOKENIZER_FILE).read_text(encoding="utf-8")
        ids = {token["content"]: token["id"] for token in json.loads(text)["added_tokens"]}
        end = ids.get(_END_OF_TURN, self._manifest.eos_token_ids[0])
        end = end if end in self._manifest.eos_token_ids else self._manifest.eos_token_ids[0]
        return LLTokenizer(text, n_vocab=self._manifest.vocab_size, eos_token=end)


class _PropertiesCountedError(OptionError):
    """llguidance counts properties only if none is optional."""


def _not_supported(what: str, told: str) -> OptionError:
    reason = _line(told.removesuffix("<non-verbose/>"))
    if "min/maxProperties" in reason:
        return _PropertiesCountedError(reason)
    hint = next((hint for part, hint in _HINTS.items() if part in reason), "change or remove this part")
    return OptionError(f"{what} is not supported: {reason}; {hint}.")


def _json_grammar(prepared: Prepared) -> str:
    """Raises OptionError if the schema is not JSON."""
    try:
        schema = json.dumps(prepared.grammar, ensure_ascii=False, allow_nan=False)
        # An escaped name could repeat a property's, so \u is allowed only if the schema has control characters.
        escapes = 'nrbtf\\"u' if _CONTROL_CHARACTER.search(schema) else 'nrbtf\\"'
        return LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_flexible": False, "json_allowed_escapes": escapes}
        )
    except (TypeError, ValueError) as error:
        raise _not_supported("This JSON schema", str(error)) from error


def _unescaped(escape: re.Match[str]) -> str:
    """A character that GBNF writes with \\u or \\U, of which gbnf_to_lark loses zeros."""
    code = int(escape[1] or escape[2] or "0", 16)
    return chr(code) if 0xA0 <= code < 0xD800 or 0xE000 <= code <= 0x10FFFF else escape[0]


def _check_json(prepared: Prepared, text: str) -> None:
    try:
        found = prepared.first_violation(text)
    except RecursionError as error:
        raise AnswerSchemaError("The answer nests too deeply to be checked; limit the depth in the schema.") from error
    except ValueError as error:
        raise AnswerSchemaError(f"The answer is not complete JSON: {_line(error)}; ask again.") from error
    if found is not None:
        place = f" at {found.at}" if found.at else ""
        raise AnswerSchemaError(
            f"The answer breaks {found.keyword} of the JSON schema{place}; this keyword can be checked only after "
            "generation, so ask again, or write the schema without it."
        )


def _check_pattern(pattern: Pattern, text: str) -> None:
    if not pattern.matches(text):
        raise AnswerSchemaError(
            "The answer breaks a look-around of the regular expression; look-around can be checked only after "
            "generation, so ask again, or write the expression without it."
        )


class _Grammar(LogitsProcessor):
    def __init__(self, matcher: LLMatcher, eos: int) -> None:
        self._matcher, self._eos = matcher, eos

    def process(self, logits: np.ndarray) -> np.ndarray:
        """Raises OptionError if the grammar grows beyond llguidance's limits."""
        allowed = np.full_like(logits, -np.inf)
        if self._matcher.is_stopped() and not self._matcher.is_error():
            allowed[self._eos] = logits[self._eos]
            return allowed
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            told = _line(self._matcher.get_error())
            raise OptionError(f"The grammar became too complex during the answer: {told}; simplify it.")
        may = np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool)
        allowed[: len(may)][may] = logits[: len(may)][may]
        return allowed

    def accept(self, token: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


def _line(error: object) -> str:
    return " ".join(str(error).split()).rstrip(".")[:300]
