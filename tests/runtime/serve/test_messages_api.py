"""/v1/messages in Anthropic's form; `tests/clients` asks it by Anthropic's own client."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import pytest

from serving import DEMO, E2B, SUM

ANSWER = "3 plus 4 is 7."
SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["sum"],
    "additionalProperties": False,
}
TOOL = {"name": "add", "description": "Adds.", "input_schema": SCHEMA}


def post(server: Any, path: str = "/v1/messages", **fields: Any) -> httpx.Response:
    body = {"model": E2B, "max_tokens": 64, "temperature": 0, "messages": [{"role": "user", "content": SUM}]}
    headers = {"x-api-key": "none", "anthropic-version": "2023-06-01"}
    return httpx.post(server.url + path, json=body | fields, headers=headers, timeout=60)


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The data of each event, whose name is its type."""
    blocks = [block.splitlines() for block in response.text.split("\n\n") if block and not block.startswith(":")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name.removeprefix("event: ") for name, _ in blocks] == [event["type"] for event in events]
    return events


def test_text_and_usage(server: Any) -> None:
    message = post(server, system="Be brief.").json()
    assert message["type"] == "message" and message["role"] == "assistant" and message["stop_reason"] == "end_turn"
    assert post(server).json()["content"] == [{"type": "text", "text": ANSWER}]
    assert message["usage"]["input_tokens"] + message["usage"]["cache_read_input_tokens"] > 10
    counted = post(server, "/v1/messages/count_tokens").json()["input_tokens"]
    usage = post(server).json()["usage"]
    assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]


def test_why_it_stopped(server: Any) -> None:
    assert post(server, max_tokens=3).json()["stop_reason"] == "max_tokens"
    stopped = post(server, stop_sequences=[" is"]).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", " is")


def test_a_picture(server: Any) -> None:
    data = base64.b64encode((DEMO / "picture.png").read_bytes()).decode()
    source = {"type": "base64", "media_type": "image/png", "data": data}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What is in the picture?"}]
    answer = post(server, messages=[{"role": "user", "content": content}]).json()["content"]
    assert answer == [{"type": "text", "text": "A red circle, a yellow star and a blue square."}]


def test_events_of_a_text(server: Any) -> None:
    events = events_of(post(server, stream=True))
    kinds = [event["type"] for event in events if event["type"] != "content_block_delta"]
    wanted = ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    assert kinds == wanted
    deltas = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(deltas) == ANSWER and len(deltas) > 3
    assert events[-2]["delta"]["stop_reason"] == "end_turn" and events[-2]["usage"]["output_tokens"] > 3


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "add"}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_used(server: Any, choice: dict[str, Any], stream: bool) -> None:
    response = post(server, tools=[TOOL], tool_choice=choice, stream=stream)
    if stream:
        events = events_of(response)
        (block,) = [event["content_block"] for event in events if event["type"] == "content_block_start"]
        written = "".join(e["delta"]["partial_json"] for e in events if e["type"] == "content_block_delta")
        block["input"], reason = json.loads(written), events[-2]["delta"]["stop_reason"]
    else:
        (block,), reason = response.json()["content"], response.json()["stop_reason"]
    assert reason == "tool_use" and block["type"] == "tool_use" and block["name"] == "add"
    assert {*block["input"]} == {"sum"}
    result = {"type": "tool_result", "tool_use_id": block["id"], "content": [{"type": "text", "text": "7"}]}
    history = [
        {"role": "user", "content": SUM},
        {"role": "assistant", "content": [block]},
        {"role": "user", "content": [result, {"type": "text", "text": SUM}]},
    ]
    assert post(server, messages=history, tools=[TOOL]).json()["content"][0]["type"] == "text"


@pytest.mark.parametrize(
    ("fields", "told", "status"),
    [
        ({"model": "other"}, "not served here", 404),
        ({"messages": []}, "at least 1", 400),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "'document'", 400),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "no input_schema", 400),
        ({"temperature": -1}, "temperature must be", 400),
        ({"messages": [{"role": "user", "content": ["hello"]}]}, "list of blocks", 400),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": ["a"]}]}
                ]
            },
            "unsupported block",
            400,
        ),
        ({"tools": [TOOL], "tool_choice": {"type": ["x"]}}, "tool_choice", 400),
        ({"container": "x"}, "container", 400),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_anthropics(server: Any, fields: dict[str, Any], told: str, status: int, stream: bool) -> None:
    response = post(server, stream=stream, **fields)
    error = response.json()
    assert response.status_code == status and error["type"] == "error" and told in error["error"]["message"]
