"""ASGI middleware: the API key, and the size of request bodies."""

from __future__ import annotations

import hmac

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import error_body


class RequireKey:
    """Refuses /v1 without the key; `key` None lets everyone pass."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app, self._key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._may_pass(scope):
            await self._app(scope, receive, send)
            return
        body = error_body(
            "The API key is missing or wrong; send it as Authorization: Bearer KEY.",
            "authentication_error",
            "invalid_api_key",
        )
        await JSONResponse(body, 401)(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        if scope["type"] != "http" or self._key is None or not scope["path"].startswith("/v1/"):
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, b"Bearer " + self._key.encode())


class _TooLargeError(Exception):
    """The request body exceeds the limit."""


class LimitBody:
    """Refuses bodies over `limit` bytes, before reading them if Content-Length says so."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        received, started = 0, False

        async def counting() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise _TooLargeError
            return message

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            if not length.isdigit() or int(length) > self._limit:
                raise _TooLargeError
            await self._app(scope, counting, sending)
        except _TooLargeError:
            if started:
                raise
            message = f"The body is larger than {self._limit:,} bytes; send smaller media."
            await JSONResponse(error_body(message, "invalid_request_error"), 413)(scope, receive, send)
