"""Objects that list their properties take no others: a model would go on writing keys that nobody reads.

As OpenAI's strict schemas demand it and llama.cpp's grammars have it. The answer matches the client's schema all the
same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Keywords that may introduce further properties.
_OPEN = {
    *("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames", "minProperties"),
    *("allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "if", "dependentSchemas", "dependencies"),
}
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_IN_ONE = ("items", "additionalItems", "additionalProperties", "contains", "then", "else")
_IN_LIST = ("anyOf", "oneOf", "allOf", "prefixItems", "items")


def close_objects(schema: Any) -> Any:
    """The schema, unchanged if schemas that apply to one value together each list properties of it."""
    return schema if any(map(_combines, nodes_of(schema))) else _closed(schema)


def _combines(node: dict[str, Any]) -> bool:
    parts = node.get("allOf")
    several = isinstance(parts, list) and len(parts) > 1
    return several or bool({"allOf", "$ref", "$dynamicRef"} & node.keys() and "properties" in node)


def nodes_of(value: Any) -> Iterator[dict[str, Any]]:
    """All objects of a JSON value."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from nodes_of(part)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for key in _BY_NAME:
        if isinstance(parts := made.get(key), dict):
            made[key] = {name: _closed(part) for name, part in parts.items()}
    for key in _IN_ONE:
        if key in made:
            made[key] = _closed(made[key])
    for key in _IN_LIST:
        if isinstance(parts := made.get(key), list):
            made[key] = [_closed(part) for part in parts]
    return {**made, "additionalProperties": False} if _lists_all(schema) else made


def _lists_all(schema: dict[str, Any]) -> bool:
    properties = schema.get("properties")
    if not isinstance(properties, dict) or not properties or _OPEN & schema.keys():
        return False
    required = schema.get("required", [])
    return isinstance(required, list) and all(isinstance(name, str) and name in properties for name in required)
