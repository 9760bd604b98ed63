"""Answers that must match a JSON schema."""

from __future__ import annotations

import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from gemma3n_onnx.runtime import OptionError
from gemma3n_onnx.runtime.artifact import load_manifest
from gemma3n_onnx.runtime.constraints.grammar import Grammars
from serving import chat, message

SCHEMA = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
    },
    "required": ["color", "count", "names"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars(demo_artifact):
    folder = demo_artifact("E2B")
    return Grammars(folder, load_manifest(folder))


def test_a_hundred_answers_of_a_schema(server):
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}

    def one(seed: int) -> str:
        answer = chat(server, message("Describe a thing."), response_format=wanted, temperature=1.5, seed=seed)
        assert answer.choices[0].finish_reason == "stop"
        return answer.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        answers = [*pool.map(one, range(100))]
    for text in answers:
        found = json.loads(text)
        assert found.keys() == {"color", "count", "names"} and found["color"] in ("red", "green", "blue")
        assert 0 <= found["count"] <= 99 and len(found["names"]) <= 3
        assert all(len(name) <= 8 for name in found["names"])
    assert len({*answers}) > 20


def test_any_json_object(server):
    options = {"response_format": {"type": "json_object"}, "max_tokens": 200, "temperature": 1.0}
    answers = [chat(server, message("Say something."), **options, seed=seed).choices[0] for seed in range(4)]
    assert all(answer.message.content.startswith("{") for answer in answers)
    ended = [json.loads(answer.message.content) for answer in answers if answer.finish_reason == "stop"]
    assert ended, "all were cut at 200 tokens"
    assert all(isinstance(found, dict) for found in ended)


def test_a_schemas_numbers_are_told_apart(server):
    """The mask follows the tokens: what comes is one of what may."""
    schema = {"type": "integer", "minimum": 10, "maximum": 12}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    answers = {
        chat(server, message("A number."), response_format=wanted, temperature=2.0, seed=seed)
        .choices[0]
        .message.content
        for seed in range(20)
    }
    assert answers <= {"10", "11", "12"} and len(answers) > 1


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"type": "integer", "multipleOf": 7919}, {"multipleOf": 7907}]},
        {"type": "integer", "multipleOf": 1000003},
        {"type": "integer", "multipleOf": 997, "anyOf": [{"multipleOf": 991}]},
        {"enum": ["x" * 190_000]},
        {
            "type": "object",
            "properties": {"a": {"enum": [f"v{i}" for i in range(2000)]}},
            "allOf": [{"if": {"properties": {"a": {"const": f"v{i}"}}}, "then": {}} for i in range(2000)],
        },
        {"type": "string", "pattern": "a" * 100_000},
        {"enum": ["x" * 1_000_000]},
    ],
)
def test_a_schema_that_would_take_minutes_is_refused_or_checked_later(grammars, schema):
    started = time.monotonic()
    with contextlib.suppress(OptionError):
        assert grammars.json_of(schema).check is not None
    assert time.monotonic() - started < 5
