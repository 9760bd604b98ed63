"""Regular expressions of JSON schemas, in ECMAScript's dialect. llguidance does not support look-around: a grammar
takes the pattern without it, which allows more, and the finished answer is matched with it.

Matching runs in llguidance, in time linear in the text; `re` backtracks, and the patterns come from clients.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark

from gemma3n_onnx.runtime.errors import OptionError

_LIMITS = LLParserLimits(initial_lexer_fuel=200_000, verbose_errors=False)
_MAX_DEPTH = 50
_MAX_PATTERN = 8_192  # characters
_MAX_REPETITIONS = 10_000
_GROUP = re.compile(r"\((?:\?(?P<kind>=|!|<=|<!)|\?(?::|P?<\w+>|[a-z]*(?:-[a-z]+)?:?))?")
_QUANTIFIER = re.compile(r"(?:[*+?]|\{\d+(?:,\d*)?\})\??")
_ANY = "ANY"


@dataclass(frozen=True)
class _Item:
    """A piece of a sequence: `text` as written; `options` of a group; `kind` of a look-around (=, !, <= or <!)."""

    text: str
    options: tuple[_Sequence, ...] = ()
    opening: str = ""
    kind: str | None = None
    quantifier: str = ""

    @property
    def looks(self) -> bool:
        return self.kind is not None or any(item.looks for option in self.options for item in option)

    def without_look(self) -> str:
        if self.kind is not None:
            return ""
        if not self.looks:
            return self.text + self.quantifier
        return f"{self.opening}{_joined(self.options)}){self.quantifier}"


_Sequence = tuple[_Item, ...]


class Pattern:
    """A pattern, searched for in a text, or matched against the whole text if `whole`."""

    def __init__(self, pattern: str, *, whole: bool = False) -> None:
        """Raises OptionError if the pattern is invalid or not supported; its message lacks the place."""
        if len(pattern) > _MAX_PATTERN:
            raise OptionError(f"it has more than {_MAX_PATTERN:,} characters; write a shorter one")
        self._options, self._whole = _Parser(pattern).parse(), whole
        if _repetitions(self._options) > _MAX_REPETITIONS:
            raise OptionError(f"repetitions multiply to more than {_MAX_REPETITIONS}; write smaller ones")
        self.has_look = any(item.looks for option in self._options for item in option)
        self.without_look = _joined([_without_anchors(option) for option in self._options] if whole else self._options)
        self._matcher = LLMatcher(_bytes_tokenizer(), self._grammar(), log_level=0, limits=_LIMITS)
        if self._matcher.is_error():
            raise OptionError(f"{_reason(self._matcher.get_error())}; write a regular expression without this")
        self.matches("")  # builds the automaton

    def matches(self, text: str) -> bool:
        """Raises OptionError if the pattern is too complex to match."""
        quoted = self._whole or self.has_look
        data = text if quoted else json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
        encoded = [*data.encode("utf-8", "replace")]
        matcher = self._matcher.deep_copy()
        matcher.compute_bitmask()
        consumed = matcher.try_consume_tokens(encoded)
        if matcher.stop_reason() in ("LexerTooComplex", "ParserTooComplex"):
            raise OptionError("it is too complex; write fewer or smaller repetitions")
        return consumed == len(encoded) and matcher.is_accepting()

    def grammar(self) -> str:
        """Of the texts that a pattern matches as a whole, look-around aside."""
        return LLMatcher.grammar_from_lark(f"start: {_concat(self.without_look, '')}")

    def _grammar(self) -> str:
        if self.has_look:
            return LLMatcher.grammar_from_lark(_LookAhead(self._whole).grammar(self._options))
        if self._whole:
            return self.grammar()
        schema = {"type": "string", "pattern": self.without_look}
        return LLMatcher.grammar_from_json_schema(json.dumps(schema))


@functools.lru_cache(maxsize=256)
def searched(pattern: str) -> Pattern:
    """As `Pattern`, kept for later calls."""
    return Pattern(pattern)


class _Parser:
    """Splits a pattern into the groups and look-arounds that it nests; everything else stays text."""

    def __init__(self, pattern: str) -> None:
        self._text, self._at = pattern, 0

    def parse(self) -> tuple[_Sequence, ...]:
        options = self._options(0)
        if self._at < len(self._text):
            raise OptionError("unopened group; write \\) for a parenthesis")
        return options

    def _options(self, depth: int) -> tuple[_Sequence, ...]:
        if depth > _MAX_DEPTH:
            raise OptionError(f"groups nest deeper than {_MAX_DEPTH}; simplify it")
        options: list[list[_Item]] = [[]]
        while self._at < len(self._text) and self._text[self._at] != ")":
            if self._text[self._at] == "|":
                self._at += 1
                options.append([])
            else:
                options[-1].append(self._item(depth))
        return tuple(tuple(option) for option in options)

    def _item(self, depth: int) -> _Item:
        start, char = self._at, self._text[self._at]
        if char == "(":
            opening = _GROUP.match(self._text, start)
            assert opening is not None
            self._at = opening.end()
            if opening[0].endswith(")"):
                return _Item(opening[0])
            options = self._options(depth + 1)
            if self._at == len(self._text):
                raise OptionError("unclosed group; write \\( for a parenthesis")
            self._at += 1
            text = self._text[start : self._at]
            return _Item(text, options, opening[0], opening["kind"], self._quantifier())
        if char == "[":
            self._skip_class()
        else:
            self._at += 2 if char == "\\" else 1
        if self._at > len(self._text):
            raise OptionError("it ends in the middle; close its class, or write \\\\ for a backslash")
        if self._text[start : self._at] in ("\\b", "\\B"):
            raise OptionError("\\b and \\B are not supported; name the characters before and after the word")
        return _Item(self._text[start : self._at], quantifier=self._quantifier())

    def _skip_class(self) -> None:
        self._at += 1
        while self._at < len(self._text) and self._text[self._at] != "]":
            self._at += 2 if self._text[self._at] == "\\" else 1
        self._at += 1

    def _quantifier(self) -> str:
        found = _QUANTIFIER.match(self._text, self._at)
        self._at = found.end() if found else self._at
        return found[0] if found else ""


class _LookAhead:
    """Lark terminals of a pattern with look-ahead. A look-ahead is an intersection with what follows it, up to the end
    of the text: `a(?!b)c` becomes `/a/ (~(/b/ ANY) & /c/)`."""

    def __init__(self, whole: bool) -> None:
        self._whole = whole
        self._terminals = [f"{_ANY}: /(?s:.*)/", "NONE: /()/"]

    def grammar(self, options: Sequence[_Sequence]) -> str:
        end = "NONE" if self._whole else _ANY
        made = []
        for option in options:
            if option and option[0].text == "^":
                made.append(self._sequence(option[1:], end))
            else:
                made.append(self._sequence(option, end) if self._whole else f"{_ANY} ({self._sequence(option, end)})")
        top = self._named(" | ".join(f"({option})" for option in made))
        return "\n".join([f"start: {top}", *self._terminals, ""])

    def _sequence(self, items: _Sequence, rest: str) -> str:
        """Terminal of `items`, followed by the terminal `rest` up to the end of the text."""
        text = ""
        for item in reversed(items):
            if item.looks or item.text == "$":
                rest = self._with(item, self._named(_concat(text, rest)))
                text = ""
            else:
                text = item.text + item.quantifier + text
        return _concat(text, rest)

    def _with(self, item: _Item, rest: str) -> str:
        if item.text == "$":
            return f"({rest} & NONE)"
        if item.kind in ("<=", "<!"):
            raise OptionError("look-behind is not supported; write it as look-ahead, or without look-around")
        if item.kind is not None:
            ahead = self._named(self._any_of(item.options, _ANY))
            return f"({rest} & {ahead})" if item.kind == "=" else f"({rest} & ~{ahead})"
        once = self._any_of(item.options, rest)
        if item.quantifier in ("?", "??"):
            return f"({once} | {rest})"
        if item.quantifier:
            raise OptionError("look-around in a repeated group is not supported; write it outside of the repetition")
        return f"({once})"

    def _any_of(self, options: Sequence[_Sequence], rest: str) -> str:
        return " | ".join(f"({self._sequence(option, rest)})" for option in options)

    def _named(self, terminal: str) -> str:
        self._terminals.append(f"T{len(self._terminals)}: {terminal}")
        return f"T{len(self._terminals) - 1}"


def _concat(text: str, rest: str) -> str:
    return f"/{regex_to_lark(text, 'dw')}/ {rest}" if text else rest or '""'


def _repetitions(options: Sequence[_Sequence]) -> int:
    """How often the pattern repeats a part at most, nested repetitions multiplied; * and + aside."""
    items = [item for option in options for item in option]
    return max((_times(item.quantifier) * _repetitions(item.options) for item in items), default=1)


def _times(quantifier: str) -> int:
    return max([1, *(int(number[:9]) for number in re.findall(r"\d+", quantifier))])


def _reason(told: str) -> str:
    lines = told.strip().splitlines()
    line = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return line.rstrip(".")


def _joined(options: Sequence[_Sequence]) -> str:
    return "|".join("".join(item.without_look() for item in option) for option in options)


def _without_anchors(option: _Sequence) -> _Sequence:
    start = bool(option) and option[0].text == "^"
    end = len(option) > start and option[-1].text == "$"
    return option[start : len(option) - end]


@functools.cache
def _bytes_tokenizer() -> LLTokenizer:
    return LLTokenizer("byte")
