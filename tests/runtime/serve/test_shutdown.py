"""SIGTERM while answers run, in a server of its own process."""

from __future__ import annotations

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server_process import server_process
from serving import LONG_ANSWER, SUM, message

ENDLESS = {"temperature": 0, "logit_bias": {"106": -100, "1": -100}, "max_tokens": 3500}
FORMAT = {
    "type": "json_schema",
    "name": "long",
    "schema": {"type": "object", "properties": {"text": {"type": "string", "minLength": 3000}}, "required": ["text"]},
}
CHAT = {"messages": message(LONG_ANSWER), **ENDLESS}
COMPLETION = {"prompt": LONG_ANSWER, **ENDLESS}
RESPONSE = {"input": LONG_ANSWER, "text": {"format": FORMAT}, "max_output_tokens": 3500}
MESSAGE = {"messages": message(LONG_ANSWER), "output_config": {"format": FORMAT}, "max_tokens": 3500}
REQUESTS = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/responses": RESPONSE,
    "/v1/messages": MESSAGE,
}
TOLD = "The server is shutting down; send the request again."
ERROR = {"message": TOLD, "type": "server_error", "param": None, "code": "shutting_down"}
ANTHROPIC_ERROR = {"type": "error", "error": {"type": "api_error", "message": TOLD}}


def send(http: httpx.Client, path: str, stream: bool) -> tuple[int, str]:
    answer = http.post(path, json={**REQUESTS[path], "stream": stream}, timeout=30)
    return answer.status_code, answer.text


def running(http: httpx.Client) -> int:
    lines = http.get("/metrics").text.splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("gemma3n_requests_running{"))


def wait_for(http: httpx.Client, count: int) -> None:
    until = time.monotonic() + 20
    while running(http) < count:
        assert time.monotonic() < until
        time.sleep(0.05)


def events(text: str) -> list[Any]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def test_every_client_gets_a_proper_end(demo_artifact: Any, tmp_path: Path) -> None:
    options = ("--rows", 8, "--grace", 0.2)
    with (
        server_process(demo_artifact("E2B"), tmp_path / "log", *options) as server,
        httpx.Client(base_url=server.url) as http,
        ThreadPoolExecutor(8) as pool,
    ):
        asked = {(path, stream): pool.submit(send, http, path, stream) for path in REQUESTS for stream in (False, True)}
        wait_for(http, 8)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=10) == 0
        log = server.read_log()
    got = {key: each.result() for key, each in asked.items()}
    for path in REQUESTS:
        status, body = got[path, False]
        wanted = ANTHROPIC_ERROR if path == "/v1/messages" else {"error": ERROR}
        assert (status, json.loads(body)) == (503, wanted)
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert events(got[path, True][1])[-1] == {"error": ERROR}
    failed, last = events(got["/v1/responses", True][1])[-2:]
    assert (failed["type"], failed["message"]) == ("error", TOLD)
    assert last["type"] == "response.failed" and last["response"]["error"] == {"code": "shutting_down", "message": TOLD}
    assert events(got["/v1/messages", True][1])[-1] == ANTHROPIC_ERROR
    assert "Traceback" not in log and "ERROR" not in log


def test_an_answer_may_end_in_its_grace_and_a_second_signal_ends_all(demo_artifact: Any, tmp_path: Path) -> None:
    with (
        server_process(demo_artifact("E2B"), tmp_path / "log") as server,
        httpx.Client(base_url=server.url) as http,
        ThreadPoolExecutor(2) as pool,
    ):
        endless = pool.submit(send, http, "/v1/chat/completions", True)
        wait_for(http, 1)
        body = {"messages": message(SUM), "temperature": 0, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            server.process.send_signal(signal.SIGTERM)
            assert answer.read().endswith(b"data: [DONE]\n\n")
        time.sleep(0.3)
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url, trust_env=False)
        assert not endless.done() and server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=2) == -signal.SIGTERM
        assert isinstance(endless.exception(), httpx.RemoteProtocolError)
