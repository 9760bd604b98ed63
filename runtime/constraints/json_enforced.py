"""What llguidance enforces of a JSON schema, and which of its keywords it does not."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Mapping
from typing import Any, TypeGuard

from .json_check import Checker, parse
from .json_dialects import Schema, name_of
from .patterns import searched

_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
_EXACT_INTEGERS = 2**53  # llguidance keeps bounds as doubles
_MAX_LISTED = 64  # values of an integer that are listed, to leave some out
_MAX_DEPENDENT = 4  # each doubles the alternatives
_MAX_ALTERNATIVES = 32
_MAX_MULTIPLE = 1000  # states of the automaton: a remainder each, and several multiply
_MAX_COMPARED = 20_000  # values that all ifs of a schema compare


class Enforcing:
    """Turns schemas into what llguidance enforces, and collects in `unenforced` the keywords that it left out."""

    def __init__(
        self, defs: Mapping[str, Schema], finite: set[str], counts_properties: bool, multiples: Collection[float]
    ) -> None:
        """`multiples`: all values of multipleOf in the schema."""
        self.unenforced: set[str] = set()
        self._defs, self._finite, self._counts_properties = defs, finite, counts_properties
        self._checker = Checker(defs)
        self._compared = 0
        self._enforces_multiples = math.prod({*multiples}) <= _MAX_MULTIPLE

    def enforced(self, schema: Schema, around: Mapping[str, Any] | None = None) -> Schema:
        """`around`: the schema whose allOf has this one."""
        if isinstance(schema, bool):
            return schema
        if (values := _listed(schema)) is not None:
            return {"enum": self._allowed(values, schema)}
        made: dict[str, Any] = {}
        also: list[Schema] = []
        for keyword, value in schema.items():
            if keyword == "if":
                also += self._alternatives(schema, around or schema)
            else:
                self._add(keyword, value, schema, made, also)
        if also:
            made["allOf"] = [*made.get("allOf", []), *also]
        return made

    def _add(
        self, keyword: str, value: Any, schema: Mapping[str, Any], made: dict[str, Any], also: list[Schema]
    ) -> None:
        """Adds one keyword to `made`, or an equivalent to `also`, of which every one has to match."""
        match keyword:
            case "$ref" if name_of(schema) not in self._finite:
                also.append(False)
            case "$ref" | "type" | "required" | "minLength" | "maxLength" | "maxItems":
                made[keyword] = value
            case "multipleOf":
                if self._enforces_multiples and isinstance(value, int):
                    made[keyword] = value
                self._leave_out(keyword, keyword not in made)
            case "minItems":
                made["minItems"] = max(value, made.get("minItems", 0))
            case "allOf":
                made[keyword] = [self.enforced(each, schema) for each in value]
            case "anyOf" | "prefixItems":
                made[keyword] = [self.enforced(each) for each in value]
            case "oneOf":
                also.append({"anyOf": [self.enforced(each) for each in value]})
                self._leave_out(keyword, len(value) > 1)
            case "items":
                made[keyword] = self.enforced(value)
            case "properties" | "patternProperties" | "additionalProperties" if "propertyNames" in schema:
                if keyword not in made:
                    self._add_named(schema, made)
            case "properties" | "patternProperties":
                made[keyword] = {name: self.enforced(each) for name, each in value.items()}
            case "additionalProperties":
                made[keyword] = self.enforced(value)
            case "propertyNames" if not {"properties", "patternProperties", "additionalProperties"} & schema.keys():
                self._add_named(schema, made)
            case "minProperties" | "maxProperties":
                if self._counts_properties:
                    made[keyword] = value
                    # A grammar cannot tell whether two names of a map are equal.
                    self._leave_out(keyword, keyword == "minProperties" and value > 1)
                elif (alternatives := _counted(keyword, value, schema)) is not None:
                    also.append({"anyOf": alternatives})
                else:
                    self._leave_out(keyword, True)
            case "pattern":
                made[keyword] = searched(value).without_look
                self._leave_out(keyword, searched(value).has_look)
            case "format" if value in _FORMATS:
                made[keyword] = value
            case "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum":
                if abs(value) <= _EXACT_INTEGERS:
                    made[keyword] = value
                self._leave_out(keyword, keyword not in made)
            case "contains":
                needed = schema.get("minContains", 1)
                made["minItems"] = max(needed, made.get("minItems", 0))
                self._leave_out(keyword, True)
            case "uniqueItems":
                items = self._followed(schema.get("items", True))
                if _is_enum(items) and "prefixItems" not in schema:
                    also.append({"maxItems": len(items["enum"])})
                self._leave_out(keyword, schema.get("maxItems", 2) > 1)
            case "dependentRequired":
                if len(value) > _MAX_DEPENDENT:
                    self._leave_out(keyword, True)
                else:
                    also += [_without_or(name, {"required": names}) for name, names in value.items()]
            case "dependentSchemas":
                if len(value) > _MAX_DEPENDENT:
                    self._leave_out(keyword, True)
                else:
                    also += [_without_or(name, self.enforced(each)) for name, each in value.items()]
            case "not":
                if value in (True, {}):
                    also.append(False)
                elif _is_only_required(value) and schema.get("type") == "object":
                    also.append({"anyOf": [{"properties": {name: False}} for name in value["required"]]})
                else:
                    self._leave_out(keyword, value is not False)

    def _alternatives(self, schema: Mapping[str, Any], around: Mapping[str, Any]) -> list[Schema]:
        """if, then and else as an anyOf, if `if` compares one property and `around` lists the values of this property.
        Without the property, `if` matches unless it requires it."""
        test = schema["if"]
        names = [*test.get("properties", {})] if isinstance(test, dict) else []
        listed = self._followed(around.get("properties", {}).get(names[0], True)) if len(names) == 1 else True
        self._compared += len(listed["enum"]) if _is_enum(listed) else 0
        too_many = self._compared > _MAX_COMPARED
        if too_many or not _compares(test, names) or around.get("type") != "object" or not _is_enum(listed):
            self._leave_out("if", True)
            return []
        name, requires, compared = names[0], test.get("required", []), test["properties"][names[0]]
        values = [(value, self._matches(value, compared)) for value in self._allowed(listed["enum"], listed)]
        branches: list[Schema] = []
        for keyword, matches in (("then", True), ("else", False)):
            these = {"enum": [value for value, matched in values if matched == matches]}
            needed = [name] if bool(requires) == matches else []
            when = {"properties": {name: these}, "required": needed}
            branches.append({"allOf": [when, self.enforced(schema.get(keyword, True))]})
        return [{"anyOf": branches}]

    def _leave_out(self, keyword: str, whether: bool) -> None:
        if whether:
            self.unenforced.add(keyword)

    def _allowed(self, values: list[Any], schema: Mapping[str, Any]) -> list[Any]:
        """Those of the listed values that match the rest of the schema."""
        others = {keyword: value for keyword, value in schema.items() if keyword != "enum"}
        return [value for value in values if self._matches(value, others)]

    def _matches(self, value: Any, schema: Schema) -> bool:
        return self._checker.first_violation(parse(json.dumps(value)), schema) is None

    def _add_named(self, schema: Mapping[str, Any], made: dict[str, Any]) -> None:
        """propertyNames with what it applies to: listed names become properties, a pattern patternProperties."""
        names, rest = self._followed(schema["propertyNames"]), schema.get("additionalProperties", True)
        properties, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        keywords = {*names} - {"type", "format"} if isinstance(names, dict) else set()
        if isinstance(names, dict) and keywords == {"enum"} and not patterns:
            allowed = [name for name in names["enum"] if isinstance(name, str) and self._matches(name, names)]
            listed = [*(name for name in properties if name in allowed), *allowed]
            made["properties"] = {name: self.enforced(properties.get(name, rest)) for name in dict.fromkeys(listed)}
            made["additionalProperties"] = False
        elif (pattern := _pattern_of(names, keywords)) and not properties and not patterns:
            made["patternProperties"] = {pattern: self.enforced(rest)}
            made["additionalProperties"] = False
        else:
            made |= {
                "properties": {name: self.enforced(each) for name, each in properties.items()},
                "patternProperties": {name: self.enforced(each) for name, each in patterns.items()},
                "additionalProperties": self.enforced(rest),
            }
            self._leave_out("propertyNames", names is False or bool(keywords))

    def _followed(self, schema: Schema) -> Schema:
        while isinstance(schema, dict) and schema.keys() == {"$ref"}:
            schema = self._defs[name_of(schema)]
        return schema


def _listed(schema: Mapping[str, Any]) -> list[Any] | None:
    """All values that the schema may have, if it lists them, or if they are few integers of which some are left out."""
    if "enum" in schema:
        return schema["enum"]
    if (
        schema.get("type") != "integer"
        or not {"not", "if"} & schema.keys()
        or not {"minimum", "maximum"} <= schema.keys()
    ):
        return None
    low, high = math.ceil(schema["minimum"]), math.floor(schema["maximum"])
    return [*range(low, high + 1)] if high - low < _MAX_LISTED else None


def _counted(keyword: str, count: int, schema: Mapping[str, Any]) -> list[Schema] | None:
    """minProperties or maxProperties as alternatives of names that are required or absent, if these are few."""
    if schema.get("additionalProperties") is not False or "patternProperties" in schema:
        return None
    required = schema.get("required", [])
    optional = [name for name in schema.get("properties", {}) if name not in required]
    present = max(0, count - len(required))
    chosen = present if keyword == "minProperties" else max(0, len(optional) - present)
    if math.comb(len(optional), chosen) > _MAX_ALTERNATIVES:
        return None
    if keyword == "maxProperties" and count < len(required):
        return [False]
    choices = itertools.combinations(optional, chosen)
    if keyword == "minProperties":
        return [{"required": [*names]} for names in choices]
    return [{"properties": dict.fromkeys(names, False)} for names in choices]


def _is_enum(schema: Schema) -> TypeGuard[dict[str, Any]]:
    return isinstance(schema, dict) and "enum" in schema


def _compares(test: dict[str, Any], names: list[str]) -> bool:
    """Whether the schema of `if` says something of one property, and nothing else."""
    return (
        len(names) == 1
        and test.keys() <= {"type", "properties", "required"}
        and test.get("type", "object") == "object"
        and test.get("required", []) in ([], names)
    )


def _without_or(name: str, schema: Schema) -> dict[str, Any]:
    return {"anyOf": [{"properties": {name: False}}, schema]}


def _is_only_required(schema: Schema) -> bool:
    return isinstance(schema, dict) and schema.keys() == {"required"} and bool(schema["required"])


def _pattern_of(names: Schema, keywords: set[str]) -> str | None:
    """The pattern of the names, if that is all that the schema says of them."""
    if isinstance(names, bool):
        return None
    if keywords == {"pattern"} and not searched(names["pattern"]).has_look:
        return names["pattern"]
    if keywords and keywords <= {"minLength", "maxLength"}:
        return f"^[\\s\\S]{{{names.get('minLength', 0)},{names.get('maxLength', '')}}}$"
    return None
