"""Reads JSON schemas of any dialect (drafts 4 to 2020-12, OpenAPI 3.0) into one form: without annotations and unknown
keywords, with every $ref as "#/$defs/NAME"."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urljoin

from gemma3n_onnx.runtime.errors import OptionError

from .json_check import parse, same
from .patterns import searched

Schema = bool | dict[str, Any]

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
# Applied to the value itself, not to its parts.
IN_PLACE = ("$ref", "allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas")
_COUNTS = {"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"}
_COUNTS |= {"minContains", "maxContains"}
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_ONE = {"additionalProperties", "propertyNames", "contains", "not", "if", "then", "else"}
_ONE |= {"unevaluatedItems", "unevaluatedProperties"}
_LISTS = {"allOf", "anyOf", "oneOf", "prefixItems"}
_MAPS = {"properties", "patternProperties", "dependentSchemas"}
_DEPENDENT = {"dependentRequired", "dependentSchemas"}  # both are dependencies in drafts 4 to 7

_MAX_DEFS = 500  # llguidance follows chains of references recursively


def everything(whole: Schema, defs: Mapping[str, Schema]) -> Iterator[dict[str, Any]]:
    """Every schema of the whole."""
    waiting = [*defs.values(), whole]
    while waiting:
        schema = waiting.pop()
        if isinstance(schema, dict):
            yield schema
            waiting += parts(schema, schema.keys() & {"items", *_LISTS, *_MAPS, *_ONE})


def name_of(schema: Mapping[str, Any]) -> str:
    """Of the schema in $defs to which this one refers."""
    return schema["$ref"].removeprefix("#/$defs/")


def parts(schema: Mapping[str, Any], keywords: Iterable[str]) -> list[Schema]:
    """The schemas under the keywords."""
    found: list[Schema] = []
    for keyword in keywords:
        value = schema.get(keyword)
        if keyword == "$ref" or value is None:
            continue
        found += value if isinstance(value, list) else [*value.values()] if keyword in _MAPS else [value]
    return found


def refused(told: str) -> OptionError:
    return OptionError(f"This JSON schema is not supported: {told}.")


@dataclass(frozen=True)
class _Place:
    """Where a part of the schema stands: the URI of its resource, and its path there."""

    uri: str
    path: str = ""

    def __truediv__(self, part: object) -> _Place:
        return _Place(self.uri, f"{self.path}/{str(part).replace('~', '~0').replace('/', '~1')}")

    def __str__(self) -> str:
        return f"{self.uri}#{self.path}"


class Reader:
    """Reads a schema, and into `defs` every schema that it refers to."""

    def __init__(self, root: Any) -> None:
        self.defs: dict[str, Schema] = {}
        self.places: dict[str, _Place] = {}
        self._root = root
        self._resources: dict[str, tuple[Any, _Place]] = {}
        self._entered: dict[int, _Place] = {}
        self._index(root, _Place(""))
        self._names: dict[tuple[str, int], str] = {}
        self._waiting: list[tuple[str, Any, _Place]] = []

    def read_all(self) -> Schema:
        whole = self._read(self._root, _Place(""))
        while self._waiting:
            name, schema, place = self._waiting.pop()
            self.defs[name], self.places[name] = self._read(schema, place), place
        return whole

    def _index(self, value: Any, place: _Place) -> None:
        """Finds resources ($id) and anchors; a reference is resolved in the resource in which it stands."""
        if isinstance(value, dict):
            if isinstance(identity := value.get("$id"), str) and not identity.startswith("#"):
                uri = _resolved(place.uri, identity).removesuffix("#")
                # Two tools may have the same $id; their own references stay apart.
                place = _Place(f"{uri}?{len(self._resources)}" if uri in self._resources else uri)
                self._entered[id(value)] = place
            if not place.path:
                self._resources.setdefault(place.uri, (value, place))
            for keyword in ("$anchor", "$dynamicAnchor", "$id"):
                if isinstance(anchor := value.get(keyword), str) and (keyword != "$id" or anchor.startswith("#")):
                    self._resources.setdefault(f"{place.uri}#{anchor.removeprefix('#')}", (value, place))
        if isinstance(value, (dict, list)):
            for part, each in value.items() if isinstance(value, dict) else enumerate(value):
                self._index(each, place / part)

    def _refer(self, reference: Any, place: _Place) -> dict[str, Any]:
        if not isinstance(reference, str):
            raise refused(f"$ref at {place} must be a string, such as '#/$defs/NAME'")
        schema, target = self._found(reference, place)
        key = (target.uri, id(schema))
        if key not in self._names:
            if len(self._names) == _MAX_DEFS:
                raise OptionError(f"This JSON schema refers to more than {_MAX_DEFS} schemas; send a smaller one.")
            self._names[key] = str(len(self._names))
            self._waiting.append((self._names[key], schema, target))
        return {"$ref": f"#/$defs/{self._names[key]}"}

    def _found(self, reference: str, place: _Place) -> tuple[Any, _Place]:
        uri, _, fragment = _resolved(place.uri, reference).partition("#")
        fragment = unquote(fragment)
        known = self._resources.get(uri if fragment.startswith("/") or not fragment else f"{uri}#{fragment}")
        if known is None:
            raise refused(
                f"$ref at {place} leads to {reference!r}, which is not in this schema; put that schema into $defs"
            )
        schema, target = known
        for part in fragment.split("/")[1:] if fragment.startswith("/") else []:
            name = part.replace("~1", "/").replace("~0", "~")
            try:
                schema = schema[int(name)] if isinstance(schema, list) else schema[name]
            except (KeyError, IndexError, TypeError, ValueError):
                raise refused(
                    f"$ref at {place} leads to {reference!r}, which is not in this schema; add it, or mend the path"
                ) from None
            target = self._entered.get(id(schema), target / name)
        return schema, target

    def _read(self, schema: Any, place: _Place) -> Schema:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise refused(f"{place} must be a schema: an object, true or false")
        place = self._entered.get(id(schema), place)
        given = {keyword: value for keyword, value in schema.items() if value is not None or keyword == "const"}
        made: dict[str, Any] = {}
        for keyword, value in given.items():
            for name, each in self._keyword(keyword, value, given, place).items():
                made[name] = made[name] | each if name in _DEPENDENT and name in made else each
        if "enum" in made and "const" in given:
            made["enum"] = [each for each in _list(made["enum"], place / "enum") if _same(each, given["const"])]
        if needed := _required_by_parts(given):
            made["required"] = [*dict.fromkeys([*made.get("required", []), *needed])]
        return _nullable(made) if given.get("nullable") is True else made

    def _keyword(self, keyword: str, value: Any, given: Mapping[str, Any], place: _Place) -> dict[str, Any]:
        """One keyword in the one form; nothing for an annotation."""
        at = place / keyword
        if keyword in ("$ref", "$dynamicRef", "$recursiveRef"):
            return self._refer(value, at)
        if keyword in _MAPS:
            return {keyword: {name: self._read(each, at / name) for name, each in self._map(value, keyword, at)}}
        if keyword in _LISTS:
            return {keyword: [self._read(each, at / i) for i, each in enumerate(_list(value, at))]}
        if keyword in _ONE:
            return {keyword: self._read(value, at)}
        if keyword in _COUNTS:
            return {keyword: _count(value, at)}
        match keyword:
            case "type":
                return _type(value, at)
            case "const":
                return {"enum": [value]} if "enum" not in given else {}
            case "enum":
                return {"enum": [*_list(value, at)]}
            case "required" if not isinstance(value, bool):
                return {"required": _names(value, at)}
            case "items" if isinstance(value, list):
                rest = given.get("additionalItems")
                made = {"prefixItems": [self._read(each, at / i) for i, each in enumerate(value)]}
                return made if rest is None else made | {"items": self._read(rest, place / "additionalItems")}
            case "items":
                return {"items": self._read(value, at)}
            case "pattern":
                _require_pattern(value, at)
                return {"pattern": value}
            case "format" if isinstance(value, str):
                return {"format": value}
            case "uniqueItems":
                return {"uniqueItems": True} if value is True else {}
            case "multipleOf":
                if _number(value, at) <= 0:
                    raise refused(f"{at} must be above 0, not {value}")
                return {"multipleOf": value}
            case "dependentRequired":
                return {keyword: {name: _names(each, at / name) for name, each in _dict(value, at).items()}}
            case "dependencies":
                return self._dependencies(_dict(value, at), at)
        return _bound(keyword, value, given, at) if keyword in _BOUNDS else {}

    def _map(self, value: Any, keyword: str, at: _Place) -> Iterable[tuple[str, Any]]:
        if keyword == "patternProperties":
            for pattern in _dict(value, at):
                _require_pattern(pattern, at)
                if searched(pattern).has_look:
                    raise refused(f"{at} has the name {pattern!r} with look-around; write it without")
        return _dict(value, at).items()

    def _dependencies(self, value: dict[str, Any], at: _Place) -> dict[str, Any]:
        """Drafts 4 to 7."""
        names = {name: _names(each, at / name) for name, each in value.items() if isinstance(each, list)}
        schemas = {name: self._read(each, at / name) for name, each in value.items() if name not in names}
        return {"dependentRequired": names, "dependentSchemas": schemas}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI 3.0."""
    if isinstance(schema.get("type"), str) and not {"enum", *IN_PLACE} & schema.keys():
        return schema | {"type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def _type(value: Any, at: _Place) -> dict[str, Any]:
    names = [value] if isinstance(value, str) else _list(value, at)
    if "any" in names:  # draft 3
        return {}
    for name in names:
        if name not in TYPES:
            raise refused(f"{at} has the unknown type {name!r}; write one of {', '.join(TYPES)}")
    return {"type": names[0] if len(names) == 1 else names}


def _bound(keyword: str, value: Any, given: Mapping[str, Any], at: _Place) -> dict[str, Any]:
    """In draft 4, exclusiveMinimum is true or false and belongs to minimum."""
    if isinstance(value, bool) and keyword.startswith("exclusive"):
        return {}
    exclusive = f"exclusive{keyword.capitalize()}"
    return {exclusive if given.get(exclusive) is True else keyword: _number(value, at)}


def _required_by_parts(given: Mapping[str, Any]) -> list[str]:
    """Draft 3: a property says itself that it is required."""
    parts = given.get("properties", {}).items()
    return [name for name, each in parts if isinstance(each, dict) and each.get("required") is True]


def _require_pattern(value: Any, at: _Place) -> None:
    if not isinstance(value, str):
        raise refused(f"{at} must be a string, not {_shown(value)}")
    try:
        searched(value)
    except OptionError as error:
        raise refused(f"the pattern at {at}: {error}") from error


def _dict(value: Any, at: _Place) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise refused(f"{at} must be an object, not {_shown(value)}")
    return value


def _list(value: Any, at: _Place) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise refused(f"{at} must be a list, not {_shown(value)}")
    return [*value]


def _names(value: Any, at: _Place) -> list[str]:
    if not all(isinstance(name, str) for name in _list(value, at)):
        raise refused(f"{at} must be a list of names, not {_shown(value)}")
    return [*value]


def _number(value: Any, at: _Place) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise refused(f"{at} must be a number, not {_shown(value)}")
    return value


def _count(value: Any, at: _Place) -> int:
    if _number(value, at) < 0 or value != int(value):
        raise refused(f"{at} must be a whole number from 0 on, not {_shown(value)}")
    return int(value)


def _shown(value: Any) -> str:
    return repr(value)[:40]


def _same(left: Any, right: Any) -> bool:
    return same(parse(json.dumps(left)), parse(json.dumps(right)))


def _resolved(base: str, reference: str) -> str:
    try:
        return base + reference if reference.startswith("#") else urljoin(base, reference)
    except ValueError:  # not a URI
        return reference
