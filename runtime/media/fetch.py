"""Opens media sources (files, URLs, data URLs, base64, bytes) as binary files.

Against SSRF, a URL's host is resolved once, all its addresses are checked, and the connection goes to a checked
address, so DNS rebinding has no effect. Each redirect is checked too. Proxies set in the environment are ignored,
because the address behind a proxy cannot be checked.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import ipaddress
import os
import re
import socket
import ssl
import stat
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import SplitResult, quote, unquote, unquote_to_bytes, urljoin, urlsplit

from gemma3n_onnx.runtime.errors import MediaError, MediaNotFoundError, UrlRefusedError

from .budget import MediaBudget, current_budget
from .decoding import DecodingMemory

Source = str | os.PathLike[str] | bytes | bytearray | memoryview

MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
PORTS = {"http": 80, "https": 443}
# Shorter strings of base64 characters are paths: no image or clip is that small.
SHORTEST_BASE64 = 64
BASE64 = re.compile(r"[A-Za-z0-9+/\s]+=*\s*")
BLOCK_BYTES = 1 << 16
POLL_SECONDS = 0.1
PDF = b"%PDF-"

GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
# IPv6 prefixes that embed an IPv4 address, and the right shift that extracts it.
CARRIERS_OF_IPV4 = (
    (ipaddress.IPv6Network("::ffff:0:0/96"), 0),  # IPv4-mapped
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),  # NAT64
    (ipaddress.IPv6Network("2002::/16"), 80),  # 6to4
)
TEREDO = ipaddress.IPv6Network("2001::/32")

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class FetchPolicy:
    """Which sources may be read, and their limits.

    `max_bytes` limits sources that are held in memory (URLs, data URLs, base64), not local files, which are read in
    place. `timeout_seconds` covers a whole fetch: DNS, connection, redirects and body. `files_under`: the folder that
    must contain local files, and the base of relative paths; None allows any file. `decoding` limits the memory of
    decoders.
    """

    max_bytes: int = 64 << 20
    timeout_seconds: float = 30.0
    allow_private: bool = False
    allow_files: bool = True
    files_under: Path | None = None
    decoding: DecodingMemory = field(default_factory=DecodingMemory, compare=False, repr=False)


def open_media(source: Source, policy: FetchPolicy) -> BinaryIO:
    """Opens `source` as a seekable binary file, which the caller closes.

    A str is an http(s) URL, a data URL, a path, or base64 of the file itself; a file URL is read inside `files_under`.
    The file counts towards the active `MediaBudget`, whose errors are raised too.

    Raises:
        MediaNotFoundError: no such file, or nothing at the URL.
        UrlRefusedError: a scheme, an address or a local file that the policy does not allow.
        MediaError: too large, too slow, unreadable, not decodable, or a PDF.
    """
    budget = current_budget()
    budget.check()
    file = _open(source, policy)
    try:
        budget.spend("size_bytes", file.seek(0, os.SEEK_END))
        file.seek(0)
        if file.read(len(PDF)) == PDF:
            raise MediaError("This is a PDF, which the model does not take; give its text, or each page as an image.")
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _open(source: Source, policy: FetchPolicy) -> BinaryIO:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if isinstance(source, os.PathLike):
        if (path := _allowed_path(os.fspath(source), policy)) is None:
            raise UrlRefusedError(f"{shorten(os.fspath(source))!r} is not in {policy.files_under}; move it there.")
        return _open_file(path, policy)
    if not isinstance(source, str):
        raise MediaError(
            f"Media cannot be read from {type(source).__name__}; give a path, a URL, a data URL, base64 text or bytes."
        )
    scheme, colon, rest = source.lstrip()[:32].partition(":")
    scheme = scheme.lower()
    if scheme in PORTS and colon:
        return io.BytesIO(fetch_url(source.strip(), policy))
    if scheme == "data" and colon:
        return io.BytesIO(decode_data_url(source.strip(), policy))
    if scheme == "file" and rest.startswith("//") and policy.allow_files and policy.files_under is not None:
        return _open_file_url(source.strip(), policy)
    if rest.startswith("//") and scheme.isalnum():
        raise UrlRefusedError(f"{shorten(source)!r} is neither an http nor an https URL; give one, or a local path.")
    if (path := _existing_path(source, policy)) is not None:
        return _open_file(path, policy)
    if len(source) >= SHORTEST_BASE64 and BASE64.fullmatch(source):
        return io.BytesIO(decode_base64(source, policy))
    if not policy.allow_files:
        raise UrlRefusedError(
            f"{shorten(source)!r} is neither a URL, a data URL nor base64 text, and local files are not allowed; "
            "send the content itself."
        )
    raise MediaNotFoundError(
        f"There is no file {shorten(source)!r}; give an existing path, an http(s) URL, a data URL or base64 text."
    )


def name_of(source: object, policy: FetchPolicy) -> str | None:
    """How messages name a source: the path of a local file, shortened; None for anything else."""
    if isinstance(source, os.PathLike):
        return shorten(os.fspath(source))
    if isinstance(source, str) and _existing_path(source, policy) is not None:
        return shorten(source)
    return None


def shorten(text: str, length: int = 200) -> str:
    """Shortens `text` for a message: a data URL can be megabytes long."""
    end = length // 2
    return text if len(text) <= length else f"{text[: length - end]}…{text[-end:]}"


def decode_base64(text: str, policy: FetchPolicy) -> bytes:
    """The bytes of base64 text, with or without line breaks and padding. MediaError: not base64, or too large."""
    _check_size(len(text) * 3 // 4, policy, "The base64 text")
    compact = "".join(text.split()).rstrip("=")
    try:
        data = base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"{shorten(text, 40)!r} is not valid base64; send the complete file in base64.") from error
    if not data:
        raise MediaError("The base64 text is empty; send the file in base64.")
    return data


def decode_data_url(url: str, policy: FetchPolicy) -> bytes:
    """The bytes of `data:[type][;base64],content`. MediaError: malformed, empty or too large."""
    header, comma, content = url.partition(",")
    if not comma:
        raise MediaError(f"The data URL {shorten(url, 40)!r} has no comma; write data:<type>;base64,<content>.")
    _check_size(len(content) * 3 // 4, policy, "The data URL")
    data = unquote_to_bytes(content)
    if header.rstrip().lower().endswith(";base64"):
        return decode_base64(data.decode("ascii", errors="replace"), policy)
    if not data:
        raise MediaError("The data URL is empty; put the bytes of the file after its comma.")
    return data


def fetch_url(url: str, policy: FetchPolicy) -> bytes:
    """The body at an http or https URL.

    Raises:
        UrlRefusedError: the URL or a redirect has another scheme, credentials, or an address that is not public.
        MediaNotFoundError: 404 or 410.
        MediaError: any other failure, more than `max_bytes`, or more than `timeout_seconds`.
        DeadlineError, MediaCancelledError: as of the active budget.
    """
    budget = current_budget()
    deadline = min(time.monotonic() + policy.timeout_seconds, budget.deadline)
    first = shorten(url)
    try:
        for _ in range(MAX_REDIRECTS + 1):
            parts = _check_url(url)
            body, location = _get(parts, policy, budget, deadline)
            if location is None:
                return body
            url = urljoin(url, location)
    except MediaError:
        raise
    except ssl.SSLCertVerificationError as error:
        raise MediaError(
            f"The certificate of {shorten(url)!r} is not valid ({error.verify_message}); use another server."
        ) from error
    except TimeoutError as error:
        budget.check()
        raise MediaError(
            f"{first!r} took longer than {policy.timeout_seconds:g} s; try again, or raise timeout_seconds."
        ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        budget.check()
        reason = getattr(error, "strerror", None) or shorten(" ".join(str(error).split())) or type(error).__name__
        raise MediaError(f"{shorten(url)!r} cannot be fetched ({reason}); check the URL and the network.") from error
    raise MediaError(f"{first!r} redirects more than {MAX_REDIRECTS} times; give the final URL.")


def is_public(address: IPAddress) -> bool:
    """Whether an address is public unicast; an embedded IPv4 address is checked instead."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not (address.is_multicast or address.is_reserved)
    for network, shift in CARRIERS_OF_IPV4:
        if address in network:
            return is_public(ipaddress.IPv4Address(int(address) >> shift & 0xFFFFFFFF))
    return address in GLOBAL_UNICAST and address not in TEREDO and address.is_global


def _allowed_path(path: str, policy: FetchPolicy) -> str | None:
    """`path`, resolved if `files_under` is set; None if it is outside that folder."""
    if policy.files_under is None:
        return path
    folder = policy.files_under.resolve()
    try:
        found = (folder / path).resolve()
    except (OSError, ValueError):
        return None
    return str(found) if found.is_relative_to(folder) else None


def _existing_path(source: str, policy: FetchPolicy) -> str | None:
    path = _allowed_path(source, policy) if policy.allow_files else None
    return path if path is not None and _exists(path) else None


def _open_file_url(url: str, policy: FetchPolicy) -> BinaryIO:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise MediaError(f"{shorten(url)!r} is not a valid URL; check its host and path.") from error
    if parts.netloc not in ("", "localhost"):
        raise UrlRefusedError(f"{shorten(url)!r} names a file of another machine; send its content instead.")
    if (path := _allowed_path(unquote(parts.path), policy)) is None:
        raise UrlRefusedError(f"{shorten(url)!r} is not in {policy.files_under}; move it there.")
    return _open_file(path, policy)


def _exists(path: str) -> bool:
    try:
        os.stat(path)
    except (OSError, ValueError):
        return False
    return True


def _open_file(path: str, policy: FetchPolicy) -> BinaryIO:
    if not policy.allow_files:
        raise UrlRefusedError(f"The local file {shorten(path)!r} is not allowed; send its content instead.")
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
            raise MediaError(f"{shorten(path)!r} is {kind}; give the path of an image, audio or video file.")
        return Path(path).open("rb")
    except MediaError:
        raise
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise MediaNotFoundError(f"There is no file {shorten(path)!r}; check the path.") from error
    except OSError as error:
        raise MediaError(f"{shorten(path)!r} cannot be read ({error.strerror}); check its permissions.") from error


def _check_size(size: int, policy: FetchPolicy, what: str) -> None:
    if size > policy.max_bytes:
        raise MediaError(
            f"{what} has more than the {policy.max_bytes:,} bytes allowed; send a smaller file, or raise max_bytes."
        )


def _check_url(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna")
    except ValueError as error:  # UnicodeError too
        raise MediaError(f"{shorten(url)!r} is not a valid URL; check its host and port.") from error
    if parts.scheme not in PORTS:
        raise UrlRefusedError(f"{shorten(url)!r} is neither an http nor an https URL; give an http(s) URL.")
    if parts.username is not None or parts.password is not None:
        raise UrlRefusedError("A URL with a user name or password is not fetched; give one without credentials.")
    if not host or port == 0:
        raise MediaError(f"{shorten(url)!r} is not a valid URL; check its host and port.")
    return parts


def _get(parts: SplitResult, policy: FetchPolicy, budget: MediaBudget, deadline: float) -> tuple[bytes, str | None]:
    """One request: the body, or the location of a redirect."""
    host = (parts.hostname or "").encode("idna").decode("ascii")
    port = parts.port or PORTS[parts.scheme]
    connection = http.client.HTTPConnection(host, port)
    raw = _connect(host, port, policy, budget, deadline)
    try:
        if parts.scheme == "https":
            context = ssl.create_default_context()
            raw = context.wrap_socket(raw, server_hostname=host, do_handshake_on_connect=False)
        with budget.interruptible(partial(_shut_down, raw)):
            if isinstance(raw, ssl.SSLSocket):
                raw.settimeout(_left(deadline))
                raw.do_handshake()
            connection.sock = _TimedSocket(raw, deadline)  # type: ignore[assignment]
            connection.request("GET", _target(parts), headers=_headers(parts, host))
            response = connection.getresponse()
            if response.status in REDIRECTS and (location := response.getheader("Location")):
                return b"", location
            return _body(response, parts, policy), None
    finally:
        raw.close()


def _target(parts: SplitResult) -> str:
    safe = "/%:@!$&'()*+,;=~"
    query = f"?{quote(parts.query, safe + '?')}" if parts.query else ""
    return (quote(parts.path, safe) or "/") + query


def _headers(parts: SplitResult, host: str) -> dict[str, str]:
    name = f"[{host}]" if ":" in host else host
    port = f":{parts.port}" if parts.port else ""
    return {
        "Host": name + port,
        "User-Agent": "gemma3n-onnx",
        "Accept": "*/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }


def _body(response: http.client.HTTPResponse, parts: SplitResult, policy: FetchPolicy) -> bytes:
    url = shorten(parts.geturl())
    if response.status in (404, 410):
        raise MediaNotFoundError(f"{url!r} does not exist (HTTP {response.status}); check the URL.")
    if response.status != 200:
        raise MediaError(f"{url!r} answered with HTTP {response.status}; give a URL that serves the file itself.")
    if (coding := response.getheader("Content-Encoding", "identity").strip().lower()) not in ("", "identity"):
        raise MediaError(f"{url!r} sent {shorten(coding)!r} encoded content; give a URL that serves the file itself.")
    declared = response.length
    _check_size(declared or 0, policy, repr(url))
    blocks: list[bytes] = []
    received = 0
    while block := response.read(BLOCK_BYTES):
        received += len(block)
        _check_size(received, policy, repr(url))
        blocks.append(block)
    if declared is not None and received < declared:
        raise MediaError(f"{url!r} ended after {received:,} of {declared:,} bytes; try again.")
    if not received:
        raise MediaError(f"{url!r} is empty; check the URL.")
    return b"".join(blocks)


def _connect(host: str, port: int, policy: FetchPolicy, budget: MediaBudget, deadline: float) -> socket.socket:
    """Checks all addresses of the host, then connects to the first that answers."""
    found = _resolve(host, port, budget, deadline)
    if not policy.allow_private:
        for *_, address in found:
            if not is_public(ipaddress.ip_address(address[0])):
                raise UrlRefusedError(
                    f"{shorten(host)!r} resolves to {address[0]}, which is not a public address; "
                    "give a public URL, or send the content itself."
                )
    failure: OSError = OSError(f"{host} has no address")
    for place, (family, kind, protocol, _, address) in enumerate(found):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(_left(deadline) / (len(found) - place))
            with budget.interruptible(partial(_shut_down, connection)):
                connection.connect(address)
            return connection
        except OSError as error:
            connection.close()
            failure = error
        except BaseException:
            connection.close()
            raise
    raise failure


def _shut_down(connection: socket.socket) -> None:
    """Wakes a thread that waits for this socket."""
    with suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _resolve(host: str, port: int, budget: MediaBudget, deadline: float) -> list[tuple[Any, ...]]:
    """Runs `getaddrinfo`, which has no timeout, in a thread that is abandoned at the deadline."""
    answer: list[Any] = []

    def ask() -> None:
        try:
            answer.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    while not answer:
        budget.check()
        thread.join(min(_left(deadline), POLL_SECONDS))
    if isinstance(answer[0], Exception):
        raise MediaNotFoundError(f"The host {shorten(host)!r} could not be resolved; check the URL.") from answer[0]
    return answer[0]


def _left(deadline: float) -> float:
    """Seconds until the deadline. TimeoutError: it has passed."""
    if (left := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return left


class _TimedSocket:
    """The socket methods that `http.client` uses, with one deadline for all sends and receives."""

    def __init__(self, raw: socket.socket, deadline: float) -> None:
        self._raw = raw
        self._deadline = deadline

    def sendall(self, data: bytes) -> None:
        self._raw.settimeout(_left(self._deadline))
        self._raw.sendall(data)

    def makefile(self, mode: str) -> BinaryIO:
        return io.BufferedReader(_TimedReader(self._raw, self._deadline))

    def close(self) -> None:
        """Does nothing: `http.client` closes early; `_get` closes the socket."""


class _TimedReader(io.RawIOBase):
    def __init__(self, raw: socket.socket, deadline: float) -> None:
        self._raw = raw
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._raw.settimeout(_left(self._deadline))
        return self._raw.recv_into(buffer)
