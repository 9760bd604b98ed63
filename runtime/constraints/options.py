"""Options that constrain an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma3n_onnx.runtime.artifact import Manifest
from gemma3n_onnx.runtime.errors import OptionError, PackageMissingError

if TYPE_CHECKING:
    from .grammar import Constraint, Grammars


@dataclass(frozen=True)
class ConstraintOptions:
    """What an answer must be; at most one of them. They need the extra `constraints`.

    json_schema: a JSON schema (a dict, or true for any JSON); the answer is compact JSON that matches it.
    regex: a regular expression that matches the whole answer.
    choice: texts, one of which is the answer.
    grammar: a grammar in llguidance's variant of Lark, or in llama.cpp's GBNF.

    What no grammar can enforce, such as some keywords of a schema, is checked when the answer has ended by itself: an
    answer that breaks it is an AnswerSchemaError. `max_new_tokens` or a stop string may cut an answer short.
    """

    json_schema: dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if len(self.given) > 1:
            raise OptionError(f"{' and '.join(self.given[:2])} both constrain the answer; give one of them.")
        for name, kind, wanted in (
            ("json_schema", dict | bool, "a dict, true or false"),
            ("regex", str, "text"),
            ("grammar", str, "text"),
            ("choice", list | tuple, "a list"),
        ):
            if (value := getattr(self, name)) is not None and not isinstance(value, kind):
                raise OptionError(f"{name} must be {wanted}, not {value!r}.")

    @property
    def given(self) -> list[str]:
        return [name for name in self.__dataclass_fields__ if getattr(self, name) is not None]


class ConstraintReader:
    """Makes constraints for the tokenizer of one artifact, which is read on first use."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest

    @cached_property
    def grammars(self) -> Grammars:
        """Raises PackageMissingError without llguidance."""
        try:
            from .grammar import Grammars
        except ModuleNotFoundError as error:
            raise PackageMissingError(
                f'Constraints need {error.name}; install it with: pip install "gemma3n-onnx[constraints]".'
            ) from error
        return Grammars(self._folder, self._manifest)

    def read(self, options: ConstraintOptions) -> Constraint | None:
        """None without a constraint.

        Raises:
            OptionError: the constraint is invalid, matches nothing, or is not supported. PackageMissingError: no
            llguidance.
        """
        if options.json_schema is not None:
            return self.grammars.json_of(options.json_schema)
        if options.regex is not None:
            return self.grammars.regex_of(options.regex)
        if options.choice is not None:
            return self.grammars.choice_of(options.choice)
        return None if options.grammar is None else self.grammars.lark_of(options.grammar)
