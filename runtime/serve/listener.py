"""A listening socket with a limit of connections: what comes above it is told so, and closed."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
from contextlib import suppress
from typing import Any

from gemma3n_onnx.runtime.errors import OptionError
from gemma3n_onnx.runtime.system import open_files_limit

from .errors import error_body

CONNECTIONS = 512
# Descriptors of the process itself, and those of media being fetched.
RESERVED_DESCRIPTORS = 32
# Of one connection: its socket, and the file of an upload.
DESCRIPTORS = 2
LOG_SECONDS = 60.0

log = logging.getLogger(__name__)


def connection_limit(wanted: int | None) -> int:
    """The connections that a server takes: `wanted`, or `CONNECTIONS` if the process may open the files for so many.

    Raises:
        OptionError: the limit of open files is too low.
    """
    files, least = open_files_limit(), wanted or 1
    if files is None:
        return wanted or CONNECTIONS
    most = (files - RESERVED_DESCRIPTORS) // DESCRIPTORS
    if most < least:
        raise OptionError(
            f"--max-connections {least} needs {RESERVED_DESCRIPTORS + DESCRIPTORS * least:,} open files, but this "
            f"process may open {files:,}; give less, or raise ulimit -n."
        )
    return wanted or min(CONNECTIONS, most)


class Listener(socket.socket):
    """Accepts connections while fewer than `limit` are open, and answers others 503. If no descriptor is free, it
    uses a spare one for that: asyncio would log a traceback for each attempt to accept."""

    def __init__(self, family: int, kind: int, protocol: int, limit: int) -> None:
        super().__init__(family, kind, protocol)
        self._limit, self._open = limit, 0
        self._logged = -LOG_SECONDS
        self._spare = os.open(os.devnull, os.O_RDONLY)

    def accept(self) -> tuple[socket.socket, Any]:
        """Raises BlockingIOError: none is waiting, or one was refused, so that the event loop serves others first."""
        try:
            accepted, address = super().accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            os.close(self._spare)
            with suppress(OSError):
                self._refuse(super().accept()[0], "open files")
            self._spare = os.open(os.devnull, os.O_RDONLY)
            raise BlockingIOError from error
        if self._open >= self._limit:
            self._refuse(accepted, f"{self._limit} connections (--max-connections)")
            raise BlockingIOError
        self._open += 1
        return _Connection(self, accepted), address

    def close(self) -> None:
        if self.fileno() != -1:
            os.close(self._spare)
        super().close()

    def closed_one(self) -> None:
        self._open -= 1

    def _refuse(self, accepted: socket.socket, used: str) -> None:
        if time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            log.warning("All %s are in use; further connections are answered 503.", used)
        with accepted, suppress(OSError):
            accepted.setblocking(False)
            accepted.send(_BUSY)
            accepted.shutdown(socket.SHUT_WR)
            accepted.recv(1 << 16)  # closing with unread data would take the answer back


class _Connection(socket.socket):
    """Tells its listener when it is closed."""

    def __init__(self, listener: Listener, accepted: socket.socket) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, accepted.detach())
        self._listener = listener

    def close(self) -> None:
        if self.fileno() != -1:
            self._listener.closed_one()
        super().close()


def _busy_answer() -> bytes:
    message = "The server has no free connection; try again later."
    body = json.dumps(error_body(message, "server_error", "too_many_connections")).encode()
    head = [
        "HTTP/1.1 503 Service Unavailable",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Retry-After: 1",
        "Connection: close",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


_BUSY = _busy_answer()
