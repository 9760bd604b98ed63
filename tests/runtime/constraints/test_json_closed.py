"""Which objects are closed."""

from __future__ import annotations

from typing import Any

import pytest

from gemma3n_onnx.runtime.constraints.json_closed import close_objects

OPEN: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
CLOSED = {**OPEN, "additionalProperties": False}


@pytest.mark.parametrize(
    ("given", "closed"),
    [
        (OPEN, CLOSED),
        ({"type": "array", "items": OPEN}, {"type": "array", "items": CLOSED}),
        ({"anyOf": [OPEN, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"allOf": [OPEN]}, {"allOf": [CLOSED]}),
        ({"$defs": {"x": OPEN}, "$ref": "#/$defs/x"}, {"$defs": {"x": CLOSED}, "$ref": "#/$defs/x"}),
        ({"properties": {"x": OPEN}}, {"properties": {"x": CLOSED}, "additionalProperties": False}),
    ],
)
def test_objects_that_list_their_properties_are_closed(given: Any, closed: Any) -> None:
    assert close_objects(given) == closed


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"type": "object"},
        {"type": "object", "properties": {}},
        {**OPEN, "additionalProperties": True},
        {**OPEN, "additionalProperties": {"type": "string"}},
        {**OPEN, "patternProperties": {"^x": True}},
        {**OPEN, "required": ["a", "b"]},
        {**OPEN, "required": [["a"]]},
        {**OPEN, "if": {"properties": {"a": {"const": True}}}, "then": {"required": ["b"]}},
        {"allOf": [OPEN, {"properties": {"b": True}}]},
        {"$defs": {"x": OPEN}, "$ref": "#/$defs/x", "properties": {"b": True}},
    ],
)
def test_others_stay_as_they_are(schema: Any) -> None:
    assert close_objects(schema) == schema
