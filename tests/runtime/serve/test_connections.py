"""Connections that send little, slowly or nothing, and more of them than the server takes."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from gemma3n_onnx.runtime.errors import OptionError
from gemma3n_onnx.runtime.serve import listener, run
from gemma3n_onnx.runtime.serve.listener import connection_limit
from gemma3n_onnx.runtime.serve.run import Times
from server_process import server_process
from serving import eventually, serving

SECONDS = 0.4
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def server(demo_artifact: Any) -> Iterator[SimpleNamespace]:
    with serving([demo_artifact("E2B")], times=Times(read=SECONDS)) as running:
        yield running


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def answer_of(connection: socket.socket) -> tuple[int, Any]:
    """Status and body of the last answer before the server closes the connection; 0 for none."""
    with connection:
        got = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    head, _, body = got[got.rfind(b"HTTP/1.1") :].partition(b"\r\n\r\n")
    return (int(head.split()[1]), json.loads(body)["error"]) if got else (0, None)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", 0),
        (b"GET /hea", 408),
        (POST + b"Content-Length: 9\r\n\r\n{", 408),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + POST + b"Content-Length: 9\r\n\r\n{", 408),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n", 408),
        (b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{", 404),
    ],
)
def test_a_request_that_does_not_arrive_is_given_up(server: Any, sent: bytes, status: int) -> None:
    started = time.monotonic()
    connection = connect(server.url)
    connection.sendall(sent)
    found, error = answer_of(connection)
    assert found == status and time.monotonic() - started < SECONDS + 2
    if status == 408:
        assert error["message"] == "The request did not arrive in 0.4 seconds; send it faster."


def test_a_connection_that_had_an_answer_has_no_more_time(server: Any) -> None:
    connection = connect(server.url)
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b" 200 OK" in connection.recv(1 << 16)
    time.sleep(SECONDS + 0.2)
    connection.sendall(b"GET /hea")
    assert answer_of(connection)[0] == 408


def test_a_slow_upload_is_taken_while_it_goes_on(server: Any) -> None:
    connection = connect(server.url)
    connection.sendall(POST + b"Connection: close\r\nContent-Length: 40000\r\n\r\n")
    for _ in range(10):
        connection.sendall(b" " * 4000)
        time.sleep(SECONDS / 5)
    status, error = answer_of(connection)
    assert status == 400 and "JSON" in error["message"]


def test_what_is_no_http_is_told_so(server: Any) -> None:
    connection = connect(server.url)
    connection.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
    assert answer_of(connection) == (
        400,
        {"message": "Invalid HTTP request received.", "type": "invalid_request_error", "param": None, "code": None},
    )


def test_more_connections_are_refused_until_one_is_free(demo_artifact: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Any] = []
    monkeypatch.setattr(listener.log, "warning", lambda *told: logged.append(told))
    with serving([demo_artifact("E2B")], connections=2) as server:
        with connect(server.url), connect(server.url):
            for _ in range(3):
                refused = httpx.get(f"{server.url}/health")
                assert refused.status_code == 503 and refused.json()["error"]["code"] == "too_many_connections"
        eventually(lambda: httpx.get(f"{server.url}/health").status_code == 200)
    assert len(logged) == 1, "one line a minute"


def test_a_client_that_takes_nothing_of_its_answer_is_left(demo_artifact: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "WRITE_SECONDS", 1)
    with serving([demo_artifact("E2B")], connections=1) as server, connect(server.url) as connection:
        started = time.monotonic()
        connection.sendall(b"GET /page/chat.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 800)  # 8 MB of answers
        eventually(lambda: httpx.get(f"{server.url}/health").status_code == 200)
        assert time.monotonic() - started < 25, "no other limit does it"


def test_no_limit_that_the_process_cannot_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "open_files_limit", lambda: 64)
    assert connection_limit(None) == 16 == connection_limit(16)
    with pytest.raises(OptionError, match=r"--max-connections 17 needs 66 open files, .* may open 64; give less"):
        connection_limit(17)
    monkeypatch.setattr(listener, "open_files_limit", lambda: None)
    assert connection_limit(None) == 512 and connection_limit(9000) == 9000


def test_64_descriptors_are_enough(demo_artifact: Any, tmp_path: Path) -> None:
    options = ("--read-timeout", SECONDS)
    with server_process(demo_artifact("E2B"), tmp_path / "log", *options, open_files=64) as server:
        with ExitStack() as held:
            for _ in range(80):
                held.enter_context(connect(server.url))
        eventually(lambda: httpx.get(f"{server.url}/health").status_code == 200)
        log = server.read_log()
    assert log.count("All 16 connections (--max-connections) are in use") == 1
    assert "Traceback" not in log and len(log) < 3000
