"""Who may ask: browsers of other origins, hosts, keys, and the names of models."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from gemma3n_onnx.runtime.serve import middleware
from gemma3n_onnx.runtime.serve.app import Access
from gemma3n_onnx.runtime.serve.middleware import LOOPBACK, host_of
from gemma3n_onnx.runtime.serve.model_pool import ServeOptions
from gemma3n_onnx.runtime.serve.run import is_loopback
from serving import E2B, SUM, message, serving

ORIGIN = "http://localhost:3000"
OPTIONS = ServeOptions(rows=2, context=512)


@pytest.fixture(scope="module")
def guarded(demo_artifact: Any) -> Iterator[SimpleNamespace]:
    access = Access(api_key="secret", origins=(ORIGIN,), hosts=LOOPBACK)
    with serving([demo_artifact("E2B")], OPTIONS, access) as running:
        yield running


def test_a_page_of_an_allowed_origin_may_ask(guarded: Any) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    url = f"{guarded.url}/v1/chat/completions"
    preflight = httpx.options(url, headers={"Origin": ORIGIN, **asked})
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    body = {"model": E2B, "messages": message(SUM), "max_tokens": 4}
    answer = httpx.post(url, json=body, headers={"Origin": ORIGIN, "Authorization": "Bearer secret"})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == ORIGIN
    refused = httpx.post(url, json=body, headers={"Origin": ORIGIN})
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == ORIGIN, "the page reads why"
    other = httpx.options(url, headers={"Origin": "http://evil.example", **asked})
    assert "access-control-allow-origin" not in other.headers


def test_a_page_reads_that_the_server_failed(guarded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bug, logged = ZeroDivisionError(), []

    def fail(_: str) -> None:
        raise bug

    monkeypatch.setattr(guarded.pool, "resolve", fail)
    monkeypatch.setattr(middleware.log, "error", lambda _, exc_info: logged.append(exc_info))
    headers = {"Origin": ORIGIN, "Authorization": "Bearer secret"}
    answer = httpx.post(f"{guarded.url}/v1/completions", json={"model": E2B, "prompt": SUM}, headers=headers)
    assert answer.status_code == 500 and answer.headers["access-control-allow-origin"] == ORIGIN
    assert answer.json()["error"]["type"] == "server_error" and "see its log" in answer.json()["error"]["message"]
    assert logged == [bug]


def test_without_origins_no_page_may_ask(server: Any) -> None:
    assert "access-control-allow-origin" not in httpx.get(f"{server.url}/v1/models", headers={"Origin": ORIGIN}).headers


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": "Bearer secret"}, {"authorization": "bearer secret"}, {"Authorization": "BEARER  secret"}],
)
def test_the_key_in_any_case(guarded: Any, headers: dict[str, str]) -> None:
    assert httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code == 200


def test_the_key_in_anthropics_header(guarded: Any) -> None:
    assert httpx.get(f"{guarded.url}/v1/models", headers={"x-api-key": "secret"}).status_code == 200
    for headers in ({}, {"Authorization": "Basic secret"}, {"Authorization": "secret"}, {"x-api-key": "Secret"}):
        assert httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code == 401
    for path in ("/v1/completions", "/v1/models/x/unload"):
        assert httpx.post(guarded.url + path, json={}).status_code == 401
    assert httpx.get(f"{guarded.url}/healthz").status_code == 200


@pytest.mark.parametrize(
    ("host", "status"), [("localhost", 200), ("127.0.0.1:99", 200), ("[::1]:8000", 200), ("evil.example", 403)]
)
def test_a_name_that_was_rebound_is_refused(guarded: Any, host: str, status: int) -> None:
    response = httpx.get(f"{guarded.url}/health", headers={"Host": host})
    assert response.status_code == status
    if status == 403:
        assert "evil.example" in response.json()["error"]["message"]


def test_paths_with_a_slash_and_head(server: Any) -> None:
    body = {"model": E2B, "messages": message(SUM), "max_tokens": 4}
    assert httpx.post(f"{server.url}/v1/chat/completions/", json=body).status_code == 200
    for path in ("", "/", "/v1/models", "/health/"):
        assert httpx.head(server.url + path).status_code == 200


def send(server: Any, content: bytes, *headers: str) -> str:
    """The answer to a request of exactly these headers."""
    host, port = server.url.removeprefix("http://").split(":")
    lines = ["POST /v1/chat/completions HTTP/1.1", f"Host: {host}:{port}", "Connection: close", *headers]
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall("\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode() + content)
        return b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()


def test_a_body_of_any_type_is_json_unless_a_page_sends_it(server: Any) -> None:
    body = f'{{"model": "{E2B}", "messages": [{{"role": "user", "content": "{SUM}"}}], "max_tokens": 4}}'.encode()
    for kind in ([], ["Content-Type:"], ["Content-Type: application/x-www-form-urlencoded"]):
        assert " 200 " in send(server, body, *kind).splitlines()[0]
        refused = send(server, body, "Origin: http://evil.example", *kind)
        assert " 415 " in refused.splitlines()[0] and "send application/json" in refused


def test_a_foreign_page_cannot_send_a_form(server: Any) -> None:
    headers = {"Origin": "http://evil.example", "Content-Type": "multipart/form-data; boundary=x"}
    for path in ("/v1/models/demo-E2B/unload", "/v1/audio/transcriptions"):
        assert httpx.post(server.url + path, headers=headers, content=b"--x--").status_code == 415
    headers["Origin"] = server.url
    assert httpx.post(f"{server.url}/v1/audio/transcriptions", headers=headers, content=b"--x--").status_code == 400


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.2", True), ("LocalHost", True), ("::1", True), ("0.0.0.0", False), ("192.0.2.1", False)],
)
def test_hosts_in_any_spelling_are_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback
    assert host_of("LocalHost:80") == "localhost" and host_of("[::1]:80") == "::1" == host_of("::1")
