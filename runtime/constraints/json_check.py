"""Whether a JSON value matches a schema that `json_schema` has read: the keywords that no grammar enforces.

Numbers are Decimals, as `parse` returns them: a float would round what the answer says.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from decimal import Context, Decimal, InvalidOperation
from typing import Any

from .patterns import searched

_EXACT = Context(prec=1000)


@dataclass(frozen=True)
class Violation:
    """`keyword` of the schema that the value at the JSON pointer `at` breaks."""

    keyword: str
    at: str


def parse(text: str) -> Any:
    """Raises ValueError if `text` is not JSON or a number is out of range, RecursionError if it nests too deeply."""
    try:
        return json.loads(text, parse_float=Decimal, parse_int=Decimal)
    except InvalidOperation as error:
        raise ValueError("a number is out of range") from error


def same(left: Any, right: Any) -> bool:
    """Equality of JSON: 1 equals 1.0 and differs from true. Both are of `parse`."""
    return _key(left) == _key(right)


class Checker:
    """Schemas whose every $ref is "#/$defs/NAME"."""

    def __init__(self, defs: Mapping[str, Any]) -> None:
        self._defs = defs
        self._known: dict[tuple[str, int], Violation | None] = {}
        self._values: list[Any] = []  # of `_known`, which keeps their ids
        self._enums: dict[int, set[Hashable]] = {}

    def first_violation(self, value: Any, schema: Any, at: str = "") -> Violation | None:
        if isinstance(schema, bool):
            return None if schema else Violation("false", at)
        for keyword, argument in schema.items():
            found = self._check(keyword, argument, value, schema, at)
            if isinstance(found, Violation):
                return found
            if not found:
                return Violation(keyword, at)
        return None

    def _matches(self, value: Any, schema: Any) -> bool:
        return self.first_violation(value, schema) is None

    def _check(self, keyword: str, argument: Any, value: Any, schema: Mapping[str, Any], at: str) -> bool | Violation:
        """Whether `value` passes one keyword, or what part of it does not."""
        match keyword:
            case "$ref":
                return self._referred(argument.removeprefix("#/$defs/"), value, at)
            case "type":
                return any(_is_type(value, name) for name in ([argument] if isinstance(argument, str) else argument))
            case "enum":
                if id(argument) not in self._enums:
                    self._enums[id(argument)] = {_key(parse(json.dumps(each))) for each in argument}
                return _key(value) in self._enums[id(argument)]
            case "allOf":
                return self._first((value, each, at) for each in argument)
            case "anyOf":
                return any(self._matches(value, each) for each in argument)
            case "oneOf":
                return sum(self._matches(value, each) for each in argument) == 1
            case "not":
                return not self._matches(value, argument)
            case "if":
                branch = schema.get("then" if self._matches(value, argument) else "else", True)
                return self.first_violation(value, branch, at) or True
        if isinstance(value, Decimal):
            return _check_number(keyword, argument, value)
        if isinstance(value, str):
            return _check_string(keyword, argument, value)
        if isinstance(value, list):
            return self._check_array(keyword, argument, value, schema, at)
        return self._check_object(keyword, argument, value, schema, at) if isinstance(value, dict) else True

    def _referred(self, name: str, value: Any, at: str) -> bool | Violation:
        """Remembers verdicts, as several references may lead to one schema and value."""
        key = (name, id(value))
        if key not in self._known:
            self._values.append(value)
            self._known[key] = self.first_violation(value, self._defs[name], at)
        return self._known[key] or True

    def _first(self, pairs: Any) -> bool | Violation:
        for value, schema, at in pairs:
            if found := self.first_violation(value, schema, at):
                return found
        return True

    def _check_array(
        self, keyword: str, argument: Any, value: list[Any], schema: Mapping[str, Any], at: str
    ) -> bool | Violation:
        match keyword:
            case "minItems":
                return len(value) >= argument
            case "maxItems":
                return len(value) <= argument
            case "prefixItems":
                return self._first((*pair, f"{at}/{i}") for i, pair in enumerate(zip(value, argument)))
            case "items":
                start = len(schema.get("prefixItems", ()))
                return self._first((value[i], argument, f"{at}/{i}") for i in range(start, len(value)))
            case "uniqueItems":
                return not argument or len({_key(item) for item in value}) == len(value)
            case "contains":
                count = sum(self._matches(item, argument) for item in value)
                return schema.get("minContains", 1) <= count <= schema.get("maxContains", count)
        return True

    def _check_object(
        self, keyword: str, argument: Any, value: dict[str, Any], schema: Mapping[str, Any], at: str
    ) -> bool | Violation:
        match keyword:
            case "required":
                return all(name in value for name in argument)
            case "minProperties":
                return len(value) >= argument
            case "maxProperties":
                return len(value) <= argument
            case "properties":
                return self._first((value[n], each, _child(at, n)) for n, each in argument.items() if n in value)
            case "patternProperties":
                return self._first(
                    (value[name], each, _child(at, name))
                    for pattern, each in argument.items()
                    for name in value
                    if searched(pattern).matches(name)
                )
            case "additionalProperties":
                others = [name for name in value if name not in schema.get("properties", ())]
                patterns = [searched(pattern) for pattern in schema.get("patternProperties", ())]
                others = [name for name in others if not any(pattern.matches(name) for pattern in patterns)]
                return self._first((value[name], argument, _child(at, name)) for name in others)
            case "propertyNames":
                return all(self._matches(name, argument) for name in value)
            case "dependentRequired":
                return all(n in value for name, needed in argument.items() if name in value for n in needed)
            case "dependentSchemas":
                return self._first((value, each, at) for name, each in argument.items() if name in value)
        return True


def _check_number(keyword: str, argument: Any, value: Decimal) -> bool:
    match keyword:
        case "minimum":
            return value >= _decimal(argument)
        case "maximum":
            return value <= _decimal(argument)
        case "exclusiveMinimum":
            return value > _decimal(argument)
        case "exclusiveMaximum":
            return value < _decimal(argument)
        case "multipleOf":
            try:
                return not _EXACT.remainder(value, _decimal(argument))
            except InvalidOperation:
                return False
    return True


def _check_string(keyword: str, argument: Any, value: str) -> bool:
    match keyword:
        case "minLength":
            return len(value) >= argument
        case "maxLength":
            return len(value) <= argument
        case "pattern":
            return searched(argument).matches(value)
    return True


def _is_type(value: Any, name: str) -> bool:
    match name:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, Decimal) and value == value.to_integral_value()
        case "number":
            return isinstance(value, Decimal)
        case "string":
            return isinstance(value, str)
        case "array":
            return isinstance(value, list)
    return isinstance(value, dict)


def _decimal(number: float) -> Decimal:
    return Decimal(repr(number))


def _key(value: Any) -> Hashable:
    if isinstance(value, dict):
        return ("object", frozenset((name, _key(each)) for name, each in value.items()))
    if isinstance(value, list):
        return ("array", tuple(_key(each) for each in value))
    return (type(value).__name__, value)


def _child(at: str, name: str) -> str:
    return f"{at}/{name.replace('~', '~0').replace('/', '~1')}"
