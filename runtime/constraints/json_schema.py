"""JSON schemas as clients write them, for llguidance.

The grammar's schema has only what llguidance enforces; keywords that it leaves out are checked after generation. It
forbids what the client's schema allows in one case: properties that an object does not list (`json_closed.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from gemma3n_onnx.runtime.errors import OptionError

from .json_check import Checker, Violation, parse
from .json_closed import close_objects, nodes_of
from .json_dialects import IN_PLACE, TYPES, Reader, Schema, everything, name_of, parts, refused
from .json_enforced import Enforcing

_MAX_DEPTH = 100  # of JSON; llguidance stops at 128
_MAX_VALUES = 10_000
# Compilation takes time in the square of these; names include items that are listed one by one.
_MAX_NAMES = 2_000
_MAX_PATTERNS = 100  # of patternProperties
_MAX_CHARACTERS = 200_000  # of names and values
_MAX_TEXT = 8_192  # characters of one of them


@dataclass(frozen=True)
class Prepared:
    """`grammar`: schema of what llguidance enforces. `schema`, with `defs`: the whole, in one dialect. `unenforced`:
    keywords to check after generation."""

    grammar: dict[str, Any]
    schema: Schema
    defs: Mapping[str, Schema]
    unenforced: frozenset[str]

    def first_violation(self, text: str) -> Violation | None:
        """Raises ValueError if `text` is not JSON, RecursionError if it nests too deeply."""
        return Checker(self.defs).first_violation(parse(text), self.schema)


def embed(schema: Schema, name: str) -> Schema:
    """The schema with `name` as its $id: once embedded, its references, "#" included, still resolve inside it."""
    if isinstance(schema, bool) or isinstance(schema.get("$id"), str):
        return schema
    return {"$id": quote(name, safe=":"), **schema}


def prepare(schema: Any, *, counts_properties: bool = True) -> Prepared:
    """`counts_properties`: whether the grammar has minProperties and maxProperties, which llguidance refuses beside
    optional properties.

    Raises:
        OptionError: the schema is invalid, or has keywords that can be neither enforced nor checked.
    """
    _require_size(schema)
    schema = close_objects(schema)
    reader = Reader(schema)
    whole = reader.read_all()
    for each in everything(whole, reader.defs):
        _evaluate_statically(each, reader.defs)
    _require_no_circle(reader)
    finite = _finite(reader.defs)
    if not _is_finite(whole, finite):
        raise _matches_nothing(whole, reader, finite)
    multiples = [node["multipleOf"] for node in nodes_of(schema) if isinstance(node.get("multipleOf"), int | float)]
    enforcing = Enforcing(reader.defs, finite, counts_properties, multiples)
    grammar = enforcing.enforced(whole)
    if isinstance(grammar, bool):
        grammar = {} if grammar else {"enum": []}
    if reader.defs:
        grammar = {**grammar, "$defs": {name: enforcing.enforced(each) for name, each in reader.defs.items()}}
    return Prepared(grammar, whole, reader.defs, frozenset(enforcing.unenforced))


_NAMES: Mapping[str, type[Sized]] = {"properties": dict, "required": list, "prefixItems": list, "items": list}


def _require_size(schema: Any) -> None:
    waiting, count, characters, names, patterns = [(schema, 0)], 0, 0, 0, 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > _MAX_DEPTH:
            raise OptionError(f"This JSON schema nests deeper than {_MAX_DEPTH} levels; move parts of it to $defs.")
        if count > _MAX_VALUES:
            raise OptionError(f"This JSON schema has more than {_MAX_VALUES:,} values; send a smaller one.")
        texts = [value] if isinstance(value, str) else [*value] if isinstance(value, dict) else []
        characters += sum(map(len, texts))
        if max(map(len, texts), default=0) > _MAX_TEXT:
            raise OptionError(f"This JSON schema has a text of more than {_MAX_TEXT:,} characters; send a shorter one.")
        if characters > _MAX_CHARACTERS:
            raise OptionError(f"This JSON schema has more than {_MAX_CHARACTERS:,} characters; send a smaller one.")
        if isinstance(value, dict):
            names += sum(_length(value.get(keyword), kind) for keyword, kind in _NAMES.items())
            patterns += _length(value.get("patternProperties"), dict)
        if patterns > _MAX_PATTERNS:
            raise OptionError(f"This JSON schema has more than {_MAX_PATTERNS} patternProperties; send a smaller one.")
        if names > _MAX_NAMES:
            raise OptionError(f"This JSON schema has more than {_MAX_NAMES:,} names; send a smaller one.")
        if isinstance(value, (dict, list)):
            parts = value.values() if isinstance(value, dict) else value
            waiting += [(part, depth + 1) for part in parts]


def _length(value: Any, kind: type[Sized]) -> int:
    return len(value) if isinstance(value, kind) else 0


def _evaluate_statically(schema: dict[str, Any], defs: Mapping[str, Schema]) -> None:
    """Replaces unevaluatedProperties and unevaluatedItems by additionalProperties and items.

    Raises:
        OptionError: what they apply to depends on the value.
    """
    rest = schema.pop("unevaluatedProperties", True)
    if rest not in (True, {}) and "additionalProperties" not in schema:
        properties = schema.get("properties", {})
        schema["properties"] = {name: properties.get(name, True) for name in _evaluated_names(schema, defs, set())}
        schema["additionalProperties"] = rest
    rest = schema.pop("unevaluatedItems", True)
    if rest not in (True, {}) and "items" not in schema:
        if {*IN_PLACE, "contains"} & schema.keys():
            raise refused("unevaluatedItems stands beside $ref, allOf, anyOf, oneOf, if or contains; write items")
        schema["items"] = rest


def _evaluated_names(schema: Schema, defs: Mapping[str, Schema], seen: set[str]) -> list[str]:
    if isinstance(schema, bool):
        return []
    found = [*schema.get("properties", {})]
    others = {"anyOf", "oneOf", "if", "dependentSchemas", "patternProperties", "additionalProperties"} & schema.keys()
    if others and (seen or others - {"patternProperties"}):
        raise refused(
            f"unevaluatedProperties stands beside {', '.join(sorted(others))}; "
            "write additionalProperties in each branch"
        )
    if "$ref" in schema and (name := name_of(schema)) not in seen:
        found += _evaluated_names(defs[name], defs, seen | {name})
    for each in schema.get("allOf", ()):
        found += _evaluated_names(each, defs, seen | {""})
    return [*dict.fromkeys(found)]


def _require_no_circle(reader: Reader) -> None:
    """Refuses references that lead back to themselves without a property or an item in between."""
    left = {name: _referred_in_place(schema) for name, schema in reader.defs.items()}
    while ends := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in ends:
            del left[name]
    if left:
        raise refused(
            f"$ref in the schema at {reader.places[min(left)]} leads back to itself without a property or an item in "
            "between; remove it, or refer to it from a property"
        )


def _referred_in_place(schema: Schema) -> set[str]:
    """Names of the $defs that the schema applies to the value itself."""
    waiting, found = [schema], set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            found |= {name_of(each)} if "$ref" in each else set()
            waiting += parts(each, IN_PLACE)
    return found


def _finite(defs: Mapping[str, Schema]) -> set[str]:
    """Names of the schemas that have a finite value."""
    found: set[str] = set()
    before = -1
    while len(found) > before:
        before = len(found)
        for name in reversed([*defs]):
            if name not in found and _is_finite(defs[name], found):
                found.add(name)
    return found


def _is_finite(schema: Schema, finite: set[str]) -> bool:
    """Whether the schema has a finite value, as far as one can tell without intersecting; `finite`: $defs that do."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema and name_of(schema) not in finite:
        return False
    if not all(_is_finite(each, finite) for each in schema.get("allOf", ())):
        return False
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema and not any(_is_finite(each, finite) for each in schema[keyword]):
            return False
    if "enum" in schema:
        return bool(schema["enum"])
    types = schema.get("type", TYPES)
    types = {types} if isinstance(types, str) else {*types}
    if types - {"array", "object"}:
        return True
    return ("object" in types and _unmet(schema, finite) is None) or (
        "array" in types and _is_finite_array(schema, finite)
    )


def _is_finite_array(schema: Mapping[str, Any], finite: set[str]) -> bool:
    prefix, needed = schema.get("prefixItems", []), schema.get("minItems", 0)
    items = [*prefix[:needed], *([schema.get("items", True)] if needed > len(prefix) else [])]
    return all(_is_finite(each, finite) for each in items)


def _unmet(schema: Mapping[str, Any], finite: set[str]) -> str | None:
    """A required property that no finite value can have."""
    others = True if "patternProperties" in schema else schema.get("additionalProperties", True)
    properties = schema.get("properties", {})
    return next((n for n in schema.get("required", ()) if not _is_finite(properties.get(n, others), finite)), None)


def _matches_nothing(whole: Schema, reader: Reader, finite: set[str]) -> OptionError:
    if endless := reader.defs.keys() - finite:
        return OptionError(
            f"No value of the schema at {reader.places[min(endless)]} ever ends, because each has to contain another "
            "one; make the property with the $ref optional, or allow null."
        )
    for schema in everything(whole, reader.defs):
        others = "patternProperties" in schema or schema.get("additionalProperties", True)
        for name in schema.get("required", ()):
            if schema.get("properties", {}).get(name, others) is False:
                return OptionError(
                    f"No value matches this JSON schema: required has {name!r}, which additionalProperties forbids; "
                    "add this name to properties."
                )
    return OptionError("No value matches this JSON schema: it has false, an empty enum or an empty anyOf; remove it.")
