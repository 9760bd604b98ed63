"""Requests that would take much memory or time are refused before the work."""

from __future__ import annotations

import json
import resource
import time
from typing import Any

import httpx
import pytest

from gemma3n_onnx.runtime.prompt.tokenizer import Tokenizer
from gemma3n_onnx.runtime.serve.json_body import MAX_DEPTH, MAX_VALUES, JsonError, parse_json
from gemma3n_onnx.runtime.serve.openai.requests import ApiModel
from serving import E2B, SUM, image, message

CHAT = {"model": E2B, "messages": message(SUM), "max_tokens": 4, "temperature": 0}
NESTED = "[" * 990 + "]" * 990


def post(server: Any, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, content=json.dumps(body), timeout=60)


def refusal(response: httpx.Response, status: int = 400) -> str:
    assert response.status_code == status, response.text[:500]
    told = response.json()["error"]["message"]
    assert len(told) <= 1000 and "\n" not in told
    return told


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"[" + b"1," * MAX_VALUES + b"1]", "more than 100,000 values"),
        (b"[" + b"{}," * MAX_VALUES + b"1]", "more than 100,000 values"),
        (b"{" + b",".join(b'"k%d":1' % i for i in range(MAX_VALUES + 2)) + b"}", "more than 100,000 values"),
        (b'["\\\\",' * MAX_VALUES, "more than 100,000 values"),
        (b'"' * 10_000_000, "more than 100,000 values"),
        (b"[" * MAX_DEPTH + b"[1]" + b"]" * MAX_DEPTH, "nests deeper than 128 levels"),
        (b"[" * 50_000, "nests deeper than 128 levels"),
        (b"]" * 1_000_000, "not JSON"),
        (b"[1,", "not JSON: Expecting value at character 3"),
        (b"1" * 5000, "too many digits"),
        (b'"\xff"', "not UTF-8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b'{"a": ["\\ud83d"]}', "lone surrogate"),
        (b'{"\\uDC00": 1}', "lone surrogate"),
    ],
)
def test_json_that_is_refused(data: bytes, told: str) -> None:
    with pytest.raises(JsonError, match=told):
        parse_json(data)


def test_json_that_is_taken() -> None:
    wide: dict[str, Any] = {f"n{i}": ["a,[{", 'quoted "\\" text'] for i in range(MAX_VALUES // 4)}
    deep: Any = 1
    for _ in range(MAX_DEPTH):
        deep = [deep]
    for value in (wide, deep, "\U0001f600", '"' * MAX_VALUES, "\\" * MAX_VALUES, "[" * MAX_VALUES, 10**4000, None):
        assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(b"\xef\xbb\xbf[1]") == [1]


@pytest.mark.parametrize(
    ("path", "field", "item"),
    [
        ("/v1/chat/completions", "messages", 1),
        ("/v1/chat/completions", "stop", 1),
        ("/v1/chat/completions", "tools", None),
        ("/v1/chat/completions", "stop_token_ids", "x"),
        ("/v1/completions", "prompt", None),
        ("/v1/completions", "images", 1),
        ("/v1/responses", "input", 1),
        ("/v1/messages", "messages", 1),
        ("/tokenize", "messages", 1),
        ("/detokenize", "tokens", "x"),
    ],
)
def test_a_list_of_wrong_items_is_one_error(
    server: Any, monkeypatch: pytest.MonkeyPatch, path: str, field: str, item: Any
) -> None:
    seen: list[int] = []
    monkeypatch.setattr("gemma3n_onnx.runtime.serve.errors.describe_validation", lambda e: (seen.append(len(e)), field))
    given = {"prompt": SUM} if path == "/v1/completions" else {} if field in ("tokens", "input") else CHAT
    response = post(server, path, **({"model": E2B} | given | {field: [item] * 50_000}))
    assert response.status_code == 400 and len(seen) == 1 and seen[0] <= 4, "an alternative of a union each"


def test_unknown_fields_and_token_ids_are_one_error(server: Any) -> None:
    unknown = {f"field{i}": 1 for i in range(50_000)}
    assert refusal(post(server, **CHAT, **unknown)) == "field0 is no field of this request."
    bias = {f"x{i}": 1 for i in range(50_000)}
    assert "takes 1,024" in refusal(post(server, **CHAT, logit_bias=bias))


def _lists(schema: Any) -> Any:
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            yield schema
        schema = [*schema.values()]
    for part in schema if isinstance(schema, list | tuple) else ():
        yield from _lists(part)


def test_every_list_of_a_request_stops_at_its_first_error() -> None:
    kinds = [ApiModel]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
        for schema in _lists(kind.__pydantic_core_schema__):
            assert schema.get("fail_fast"), kind


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"stop": ["x"] * 65}, "stop: List should have at most 64 items"),
        ({"stop": "x" * 513}, "stop[0]: String should have at most 512 characters"),
        ({"stop_token_ids": [1] * 1025}, "at most 1024 items"),
        ({"messages": message(SUM) * 4097}, "at most 4096 items"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 513}, "at most 512 items"),
        ({"x" * 10_000_000: 1}, "is no field of this request."),
        ({"top_k": "x" * 10_000_000}, "top_k: Input should be a valid integer"),
        ({"best_of": "x" * 10_000_000}, "supports only 1"),
    ],
)
def test_the_first_fault_is_told_shortly(server: Any, fields: dict[str, Any], told: str) -> None:
    assert told in refusal(post(server, **(CHAT | fields)))


@pytest.mark.parametrize("stream", [False, True])
def test_values_that_no_one_can_read_are_told(server: Any, stream: bool) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": NESTED}}
    history = [*message(SUM), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c"}]
    assert "arguments of message 1 nests deeper" in refusal(post(server, **CHAT | {"messages": history}, stream=stream))
    assert "The JSON schema nests deeper" in refusal(post(server, **CHAT, guided_json=NESTED, stream=stream))
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,\ud800"}}
    assert "lone surrogate" in refusal(post(server, **CHAT | {"messages": message(SUM, url)}, stream=stream))


def test_a_chunked_body_above_the_limit_is_too_large(server: Any) -> None:
    def chunks() -> Any:
        for _ in range(70):
            yield b" " * 1_000_000

    response = httpx.post(f"{server.url}/v1/chat/completions", content=chunks(), timeout=60)
    assert "The body is larger than" in refusal(response, 413)


def test_long_bodies_are_parsed_beside_the_event_loop(server: Any) -> None:
    body = json.dumps(CHAT | {"model": "x" * 20_000_000}).encode()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    assert "is not served here" in refusal(httpx.post(f"{server.url}/v1/chat/completions", content=body), 404)
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 250_000, "KiB, the client's included"


LONG = "word " * 400_000
TEXTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": message(LONG)}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": LONG}]}]}),
    ("/v1/chat/completions", {"messages": message("word " * 1000) * 400}),
    ("/v1/chat/completions", CHAT | {"tools": [{"function": {"name": "f", "parameters": {"description": LONG}}}]}),
    ("/v1/chat/completions", CHAT | {"chat_template_kwargs": {"x": [LONG]}}),
    ("/v1/completions", {"prompt": LONG}),
    ("/v1/completions", {"prompt": [SUM, LONG]}),
    ("/v1/responses", {"input": LONG}),
    ("/v1/messages", {"messages": message(SUM), "system": LONG}),
    ("/v1/messages/count_tokens", {"messages": message(LONG)}),
    ("/tokenize", {"content": LONG}),
]


@pytest.mark.parametrize(("path", "body"), TEXTS)
def test_text_beyond_the_context_is_not_tokenized(
    server: Any, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    lengths: list[int] = []
    encode = Tokenizer.encode

    def record(self: Tokenizer, text: str, *args: Any, **options: Any) -> list[int]:
        lengths.append(len(text))
        return encode(self, text, *args, **options)

    monkeypatch.setattr(Tokenizer, "encode", record)
    told = refusal(post(server, path, **{"model": E2B} | body))
    assert "the context of 1,024 tokens never takes more than" in told and sum(lengths) < 10_000


def test_more_prompts_than_the_queue_takes_are_not_tokenized(server: Any) -> None:
    response = post(server, "/v1/completions", model=E2B, prompt=["word " * 1000] * 5000)
    assert "5000 answers, but this server takes at most 68" in refusal(response)


def test_media_are_no_text(server: Any) -> None:
    picture = image("data:image/png;base64," + "A" * 3_000_000)
    assert "characters" not in refusal(post(server, **CHAT | {"messages": message(SUM, picture)}))


def test_tokens_are_never_longer_than_the_longest(server: Any) -> None:
    tokenizer = server.pool.loaded[E2B].model.tokenizer
    assert tokenizer.longest_token == 31
    for text in ("\n" * 31 * 50, " " * 31 * 50, "hello  world\t" * 100, "<start_of_turn>" * 50, "\U0001f600" * 100):
        assert len(tokenizer.encode(text, add_bos=False)) >= len(text) / tokenizer.longest_token
