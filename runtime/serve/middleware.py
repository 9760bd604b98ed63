"""ASGI middleware: hosts, keys, bodies, bugs, and what clients write in different ways."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import body_for, error_body, status_and_body
from .worker import ShutdownError

FORM_PATHS = ("/v1/audio/transcriptions", "/v1/audio/translations")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Open to health checks, which have no key; the answers hold no secrets.
OPEN_PATHS = ("/", "/health", "/healthz")
OPEN_FOLDER = "/page/"

log = logging.getLogger(__name__)


class RequireHost:
    """Refuses requests whose Host header is not one of `hosts`, which a web page's DNS rebinding sends; None takes
    any."""

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._hosts is not None:
            host = host_of(_header(scope, b"host"))
            if host not in self._hosts:
                message = (
                    f"The Host {host[:100]!r} is not this server's; use {', '.join(self._hosts)}, or --allow-hosts."
                )
                await _refuse(scope, receive, send, 403, error_body(message, "invalid_request_error"))
                return
        await self._app(scope, receive, send)


class RequireOrigin:
    """Refuses requests of web pages whose origin is neither this server's nor one of `origins`. Browsers send some of
    them without asking first. Origins of other schemes, such as an extension's, are no web pages."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self._app, self._origins = app, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._may_pass(_header(scope, b"origin"), _header(scope, b"host")):
            message = "Pages of this origin may not use the server; allow it with --allow-origins."
            await _refuse(scope, receive, send, 403, error_body(message, "invalid_request_error"))
            return
        await self._app(scope, receive, send)

    def _may_pass(self, origin: str, host: str) -> bool:
        scheme, _, own = origin.partition("://")
        is_page = scheme in ("http", "https", "null")
        return not is_page or own == host or "*" in self._origins or origin in self._origins


class Lenient:
    """Accepts what clients write in different ways: a trailing slash, HEAD for GET (the server drops the body), and a
    body of another Content-Type as JSON, as curl sends it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = dict(scope)
            if len(path := scope["path"]) > 1:
                scope["path"] = path.rstrip("/") or "/"
            if scope["method"] == "HEAD":
                scope["method"] = "GET"
            kind = _header(scope, b"content-type")
            form = kind.lower().startswith("multipart/") and scope["path"] in FORM_PATHS
            if scope["method"] == "POST" and not (_is_json(kind) or form):
                others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
                scope["headers"] = [*others, (b"content-type", b"application/json")]
        await self._app(scope, receive, send)


class AnswerBugs:
    """Answers an exception that no handler takes with 500, and logs it. The answers of an application's own handler of
    `Exception` pass no middleware, so they have no CORS headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception as error:
            if started or scope["type"] != "http":
                raise
            log.error("a request failed", exc_info=error)
            body = error_body("The server failed on this request; see its log.", "server_error")
            await _refuse(scope, receive, send, 500, body)


@dataclass
class Unanswered:
    """The requests whose response has not begun; streams that have begun end by an event of their own."""

    tasks: set[asyncio.Task[Any] | None] = field(default_factory=set)
    ended: bool = False

    def end(self) -> None:
        """Cancels them, so that `EndUnanswered` answers them."""
        self.ended = True
        for task in [*self.tasks]:
            if task is not None:
                task.cancel()


class EndUnanswered:
    """Answers requests 503 that have no response when the server ends."""

    def __init__(self, app: ASGIApp, unanswered: Unanswered) -> None:
        self._app, self._unanswered = app, unanswered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        task = asyncio.current_task()

        async def sending(message: Message) -> None:
            self._unanswered.tasks.discard(task)
            await send(message)

        self._unanswered.tasks.add(task)
        try:
            await self._app(scope, receive, sending)
        except asyncio.CancelledError:
            if task not in self._unanswered.tasks or not self._unanswered.ended:
                raise
            await _refuse(scope, receive, send, *status_and_body(ShutdownError()))
        finally:
            self._unanswered.tasks.discard(task)


class RequireKey:
    """Refuses all but the page and the health checks without the key; `key` None lets everyone pass."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app, self._key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._may_pass(scope):
            await self._app(scope, receive, send)
            return
        message = "The API key is missing or wrong; send it as Authorization: Bearer KEY."
        body = error_body(message, "authentication_error", "invalid_api_key")
        await _refuse(scope, receive, send, 401, body)

    def _may_pass(self, scope: Scope) -> bool:
        if scope["type"] != "http" or self._key is None:
            return True
        if scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_FOLDER):
            return True
        scheme, _, bearer = _header(scope, b"authorization").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else _header(scope, b"x-api-key")
        return hmac.compare_digest(given.encode(), self._key.encode())


class LimitBody:
    """Refuses bodies over `limit` bytes, before reading them if Content-Length says so."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        message = f"The body is larger than {self._limit:,} bytes; send smaller media."
        length = _header(scope, b"content-length") or "0"
        if not length.isdigit() or int(length) > self._limit:
            await _refuse(scope, receive, send, 413, error_body(message, "invalid_request_error"))
            return
        received = 0

        async def counting() -> Message:
            nonlocal received
            part = await receive()
            received += len(part.get("body", b""))
            if received > self._limit:
                raise HTTPException(413, message)
            return part

        await self._app(scope, counting, send)


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, body: dict[str, Any]) -> None:
    await JSONResponse(body_for(scope["path"], body), status)(scope, receive, send)


def _header(scope: Scope, name: bytes) -> str:
    return dict(scope["headers"]).get(name, b"").decode("latin-1")


def _is_json(content_type: str) -> bool:
    main, _, subtype = content_type.partition(";")[0].strip().lower().partition("/")
    return main == "application" and (subtype == "json" or subtype.endswith("+json"))


def host_of(header: str) -> str:
    """A Host header without its port, an IPv6 address without its brackets."""
    header = header.lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header if header.count(":") > 1 else header.partition(":")[0]
