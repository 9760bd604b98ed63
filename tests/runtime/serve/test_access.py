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
    assert httpx.get(f"{guarded.url}/metrics").status_code == 401
    assert httpx.get(f"{guarded.url}/metrics", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert httpx.get(f"{guarded.url}/healthz").status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:99", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("x" * 9000, 403),
    ],
)
def test_a_name_that_was_rebound_is_refused(guarded: Any, host: str, status: int) -> None:
    response = httpx.get(f"{guarded.url}/health", headers={"Host": host})
    assert response.status_code == status
    if status == 403:
        assert host[:100] in response.json()["error"]["message"] and len(response.text) < 400


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


def test_a_body_of_any_type_is_json(server: Any) -> None:
    body = f'{{"model": "{E2B}", "messages": [{{"role": "user", "content": "{SUM}"}}], "max_tokens": 4}}'.encode()
    for kind in ([], ["Content-Type:"], ["Content-Type: application/x-www-form-urlencoded"]):
        assert " 200 " in send(server, body, *kind).splitlines()[0]


@pytest.mark.parametrize("origin", ["http://evil.example", "https://evil.example:8000", "null"])
@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("GET", "/v1/models", ""),
        ("GET", "/metrics", ""),
        ("OPTIONS", "/v1/chat/completions", ""),
        ("POST", "/v1/chat/completions", ""),
        ("POST", "/v1/messages", "application/json"),
        ("POST", "/v1/audio/transcriptions", "multipart/form-data; boundary=x"),
        ("POST", "/v1/models/demo-E2B/unload", "text/plain"),
    ],
)
def test_a_foreign_page_may_not_use_the_server(server: Any, origin: str, method: str, path: str, kind: str) -> None:
    answer = httpx.request(method, server.url + path, headers={"Origin": origin, "Content-Type": kind}, content=b"{}")
    assert answer.status_code == 403 and "--allow-origins" in answer.json()["error"]["message"]
    assert ("type" in answer.json()) == (path == "/v1/messages"), "in the form of its API"


def test_the_own_page_and_programs_may_use_the_server(server: Any) -> None:
    for origin in (server.url, "chrome-extension://abc", "vscode-webview://abc", "file://"):
        assert httpx.get(f"{server.url}/v1/models", headers={"Origin": origin}).status_code == 200
    form = {"Origin": server.url, "Content-Type": "multipart/form-data; boundary=x"}
    assert httpx.post(f"{server.url}/v1/audio/transcriptions", headers=form, content=b"--x--").status_code == 400


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.2", True), ("LocalHost", True), ("::1", True), ("0.0.0.0", False), ("192.0.2.1", False)],
)
def test_hosts_in_any_spelling_are_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback
    assert host_of("LocalHost:80") == "localhost" and host_of("[::1]:80") == "::1" == host_of("::1")
