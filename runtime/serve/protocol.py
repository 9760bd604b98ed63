"""HTTP/1.1 with a limit on how slowly a request may arrive."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import error_body

# What a request's bytes have to come at, on average, after its first `read_seconds`.
BYTES_PER_SECOND = 16_384


class TimedProtocol(H11Protocol):
    """Closes a connection whose request, head and body, does not arrive in `read_seconds`, and one more second for each
    `BYTES_PER_SECOND` that did. An idle connection that has had an answer is uvicorn's keep-alive."""

    def __init__(self, *arguments: Any, read_seconds: float, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._read_seconds = read_seconds
        self._reading: asyncio.TimerHandle | None = None
        self._received = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        super().data_received(data)

    def handle_events(self) -> None:
        """Called for new data, and after an answer, for what came of the next request meanwhile."""
        super().handle_events()
        if self.timeout_keep_alive_task is not None or self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_waiting()
        elif self._reading is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._refuse(HTTPStatus.BAD_REQUEST, msg)

    def _wait(self) -> None:
        self._began = self.loop.time()
        self._reading = self.loop.call_later(self._read_seconds, self._check)

    def _stop_waiting(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        self._reading, self._received = None, 0

    def _check(self) -> None:
        """Ends the connection, or waits for more of a request that comes fast enough, or that the server reads."""
        refused = self.conn.our_state in (h11.DONE, h11.MUST_CLOSE)  # before the body was read
        earned = 0.0 if refused else self._received / BYTES_PER_SECOND
        left = self._began + self._read_seconds + earned - self.loop.time()
        if self.flow.read_paused:
            left = max(left, self._read_seconds)
        if left > 0:
            self._reading = self.loop.call_later(left, self._check)
            return
        self._reading = None
        half_a_head = self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]
        if half_a_head or self.conn.our_state is h11.SEND_RESPONSE:
            message = f"The request did not arrive in {self._read_seconds:g} seconds; send it faster."
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, message)
        self.transport.close()

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        if self.cycle is not None:
            self.cycle.disconnected = True  # nothing else is sent
        body = json.dumps(error_body(message, "invalid_request_error")).encode()
        headers: Any = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        response = h11.Response(status_code=status, headers=headers, reason=status.phrase)
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
