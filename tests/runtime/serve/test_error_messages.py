"""What a refused request is told: which field, in the request's own words, and what was meant."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from serving import E2B, SUM, message

CHAT = {"messages": message(SUM)}
LIMIT = "must be a whole number of at least 1, not 0."


@pytest.mark.parametrize(
    ("path", "body", "field", "says"),
    [
        ("chat/completions", CHAT | {"max_tokens": 0}, "max_tokens", f"max_tokens {LIMIT}"),
        ("chat/completions", CHAT | {"max_completion_tokens": 0}, "max_completion_tokens", LIMIT),
        ("responses", {"input": SUM, "max_output_tokens": 0}, "max_output_tokens", f"max_output_tokens {LIMIT}"),
        ("completions", {"prompt": SUM, "top_k": -5}, "top_k", "top_k must be a whole number of at least 1, not -5."),
        ("completions", {"prompt": "a " * 2000}, "max_tokens", "lower max_tokens."),
        (
            "chat/completions",
            CHAT | {"temprature": 1},
            "temprature",
            "no field of this request; did you mean temperature?",
        ),
        ("chat/completions", CHAT | {"xyzzy": 1}, "xyzzy", "xyzzy is no field of this request."),
        ("chat/completions", CHAT | {"temperature": "hot"}, "temperature", "should be a valid number, not 'hot'."),
        ("chat/completions", CHAT | {"stop": [1]}, "stop[0]", "stop[0]: Input should be a valid string, not 1."),
        ("completions", {"prompt": {"a": 1}}, "prompt", "prompt: Input should be a valid string or a valid list."),
        ("chat/completions", CHAT | {"n": 99}, "n", "less than or equal to 16, not 99."),
        ("chat/completions", CHAT | {"long_audio": "cut"}, "long_audio", "long_audio is 'cut'; choose error or split."),
        (
            "chat/completions",
            CHAT | {"tools": [{"type": "function", "function": {"name": 3}}]},
            "tools[0].function.name",
            "tools[0].function.name: Input should be a valid string, not 3.",
        ),
    ],
)
def test_a_refused_request_is_told_its_field(server: Any, path: str, body: dict, field: str, says: str) -> None:
    response = httpx.post(f"{server.url}/v1/{path}", json={"model": E2B} | body, timeout=60)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == field
    assert says in error["message"] and "max_new_tokens" not in error["message"]
