"""What may be read, from where, how much and for how long."""

from __future__ import annotations

import base64
import http.server
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from gemma3n_onnx.runtime.errors import MediaError, MediaNotFoundError, UrlRefusedError
from gemma3n_onnx.runtime.media import fetch
from gemma3n_onnx.runtime.media.fetch import FetchPolicy, decode_base64, is_public, open_media

LOCAL = FetchPolicy(allow_private=True, max_bytes=100_000, timeout_seconds=5)
PUBLIC = FetchPolicy(timeout_seconds=5)
CONTENT = bytes(range(256)) * 40


def read(source: Any, policy: FetchPolicy = LOCAL) -> bytes:
    with open_media(source, policy) as file:
        return file.read()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        route = self.path.strip("/").split("/")
        getattr(self, f"send_{route[0]}", self.send_missing)(*route[1:])

    def reply(self, code: int = 200, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def send_content(self, *_: str) -> None:
        self.reply(body=CONTENT)

    def send_missing(self, *_: str) -> None:
        self.reply(404)

    def send_status(self, code: str) -> None:
        self.reply(int(code))

    def send_hops(self, count: str) -> None:
        self.reply(302, Location=f"/hops/{int(count) - 1}" if int(count) > 1 else "/content")

    def send_to(self, *target: str) -> None:
        self.reply(301, Location=unquote("/".join(target)).replace("~", "/"))

    def send_declares(self, count: str) -> None:
        self.reply(body=b"x" * 10, length=int(count))
        self.close_connection = True

    def send_chunks(self, count: str) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(int(count)):
            self.wfile.write(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def send_headers_slowly(self) -> None:
        for letter in "HTTP/1.1 200 OK" + " " * 100:
            self.wfile.write(letter.encode())
            time.sleep(0.05)

    def send_body_slowly(self) -> None:
        self.reply(body=b"", length=1000)
        for _ in range(100):
            self.wfile.write(b"x")
            time.sleep(0.05)

    def send_packed(self) -> None:
        self.reply(body=CONTENT, Content_Encoding="gzip")

    def send_host(self) -> None:
        self.reply(body=self.headers["Host"].encode())

    def log_message(self, *_: Any) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Clients that leave are what these tests are about."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with Server(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def resolver(*addresses: str) -> Callable[..., list[Any]]:
    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        return [
            (socket.AF_INET6 if ":" in each else socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port))
            for each in addresses
        ]

    return getaddrinfo


def test_local_sources(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    text = base64.b64encode(CONTENT).decode()
    folded = base64.encodebytes(CONTENT).decode()
    percent = "".join(f"%{byte:02x}" for byte in CONTENT)
    urls = [f"data:image/png;base64,{text}", f"DATA:;base64,{text}", f"data:application/x,{percent}"]
    for source in [path, str(path), CONTENT, bytearray(CONTENT), memoryview(CONTENT), text, folded, *urls]:
        assert read(source) == CONTENT


def test_base64_without_padding() -> None:
    assert decode_base64("YWJjZA", LOCAL) == b"abcd"


def test_a_local_file_may_be_larger_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(200_000))
    assert len(read(path)) == 200_000


@pytest.mark.parametrize("exists", [True, False])
def test_no_local_files_for_those_far_away(tmp_path: Path, exists: bool) -> None:
    """The answer does not say whether there is a file."""
    path = tmp_path / "secret"
    if exists:
        path.write_bytes(CONTENT)
    remote = FetchPolicy(allow_files=False)
    for source in (path, str(path)):
        with pytest.raises(UrlRefusedError, match=r"not allowed; send"):
            read(source, remote)
    assert read(base64.b64encode(CONTENT).decode(), remote) == CONTENT


def test_urls(server: str) -> None:
    assert read(f"{server}/content") == CONTENT
    assert read(f"  {server}/content/with space/ü?q=ä#part\n") == CONTENT
    assert read(f"{server}/chunks/20") == b"x" * 20_000
    assert read(server.replace("http", "HTTP") + "/content") == CONTENT


def test_the_host_header_is_the_urls(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", resolver("127.0.0.1"))
    port = server.rsplit(":", 1)[1]
    assert read(f"http://media.example:{port}/host") == f"media.example:{port}".encode()


@pytest.mark.parametrize("hops", [1, 5])
def test_redirects_are_followed(server: str, hops: int) -> None:
    assert read(f"{server}/hops/{hops}") == CONTENT


@pytest.mark.parametrize(
    ("route", "kind", "says"),
    [
        ("/hops/6", MediaError, "redirects more than 5 times"),
        ("/missing", MediaNotFoundError, "HTTP 404"),
        ("/status/410", MediaNotFoundError, "HTTP 410"),
        ("/status/500", MediaError, "HTTP 500"),
        ("/status/204", MediaError, "HTTP 204"),
        ("/status/200", MediaError, "is empty"),
        ("/declares/100001", MediaError, "100,000 bytes allowed"),
        ("/chunks/101", MediaError, "100,000 bytes allowed"),
        ("/declares/20", MediaError, "ended after 10 of 20 bytes"),
        ("/packed", MediaError, "'gzip'"),
        ("/to/ftp:~~example.com~a", UrlRefusedError, "neither an http nor an https"),
        ("/to/file:~~~etc~passwd", UrlRefusedError, "neither an http nor an https"),
        ("/to/http:~~user:secret@example.com~", UrlRefusedError, "user name or password"),
        ("/to/http:~~[nonsense~", MediaError, "Invalid IPv6 URL"),
    ],
)
def test_what_a_server_can_do_wrong(server: str, route: str, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match="(?s)" + says.replace("(", r"\(")) as raised:
        read(server + route)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("route", ["/headers_slowly", "/body_slowly"])
def test_a_slow_server_is_left_in_time(server: str, route: str) -> None:
    started = time.monotonic()
    with pytest.raises(MediaError, match=r"longer than 0.5 s"):
        read(server + route, FetchPolicy(allow_private=True, timeout_seconds=0.5))
    elapsed = time.monotonic() - started
    print(f"{route}: left after {elapsed:.2f} s of 0.5")
    assert elapsed < 1.5


def test_a_slow_name_server_is_left_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3))
    with pytest.raises(MediaError, match=r"longer than 0.2 s"):
        read("http://example.com/", FetchPolicy(timeout_seconds=0.2))


def test_a_redirect_into_the_local_network_is_refused(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first host counts as public, which leaves the second one to be found out."""
    monkeypatch.setattr(fetch, "is_public", lambda address: str(address) == "127.0.0.1")
    assert read(f"{server}/content", PUBLIC) == CONTENT
    for target in ("http:~~10.0.0.1~", "http:~~[::1]~", "http:~~169.254.169.254~latest"):
        with pytest.raises(UrlRefusedError, match="not a public address"):
            read(f"{server}/to/{target}", PUBLIC)


def test_the_checked_address_is_the_one_connected_to(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is public when asked first and local when asked again is asked once."""
    answers = iter([resolver("93.184.215.14"), resolver("127.0.0.1")])
    asked: list[str] = []
    connected: list[Any] = []

    def getaddrinfo(host: str, port: int, **options: Any) -> list[Any]:
        asked.append(host)
        return next(answers)(host, port)

    def connect(_: socket.socket, address: Any) -> None:
        connected.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(MediaError, match="Connection refused"):
        read("http://rebinding.example/", PUBLIC)
    assert asked == ["rebinding.example"] and connected == [("93.184.215.14", 80)]


@pytest.mark.parametrize("addresses", [("10.1.2.3",), ("fd00::1",), ("93.184.215.14", "127.0.0.1")])
def test_names_of_local_addresses_are_refused(addresses: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", resolver(*addresses))
    with pytest.raises(UrlRefusedError, match="not a public address"):
        read("https://innocent.example/image.png", PUBLIC)


def test_the_next_address_is_tried(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", resolver("127.0.0.2", "127.0.0.1"))
    assert read(f"http://two.example:{server.rsplit(':', 1)[1]}/content") == CONTENT


def test_proxies_of_the_environment_are_not_used(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert read(f"{server}/content") == CONTENT


def test_tls_to_a_server_without_it_is_one_sentence(server: str) -> None:
    with pytest.raises(MediaError, match="cannot be fetched") as raised:
        read(server.replace("http", "https") + "/content")
    assert "\n" not in str(raised.value)


def test_a_certificate_of_another_is_refused(tmp_path: Path) -> None:
    import shutil
    import ssl
    import subprocess

    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout {key} -out {certificate}"
    subprocess.run(command.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with Server(("127.0.0.1", 0), Handler) as running:
        running.socket = context.wrap_socket(running.socket, server_side=True)
        threading.Thread(target=running.serve_forever, daemon=True).start()
        with pytest.raises(MediaError, match=r"certificate of .* is not valid"):
            read(f"https://localhost:{running.server_port}/content")
        running.shutdown()


NOT_PUBLIC = """
0.0.0.0 10.0.0.1 100.64.0.1 127.0.0.1 127.255.0.9 169.254.169.254 172.16.0.1 192.0.2.1 192.168.1.1 198.18.0.1
224.0.0.1 240.0.0.1 255.255.255.255 :: ::1 ::7f00:1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::7f00:1
64:ff9b::a9fe:a9fe 64:ff9b:1::1 2002:7f00:1:: 2002:a00:1:: 2001:0:1::1 2001:db8::1 fc00::1 fd12::1 fe80::1
fec0::1 ff02::1 100::1
"""
IS_PUBLIC = "8.8.8.8 93.184.215.14 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::1"


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", IS_PUBLIC.split())
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def test_long_sources_are_not_repeated_in_messages() -> None:
    for source in ("data:image/png;base64," + "@" * 90_000, "?" * 90_000, "http://" + "x" * 90_000):
        with pytest.raises(MediaError) as raised:
            read(source)
        assert len(str(raised.value)) < 400
