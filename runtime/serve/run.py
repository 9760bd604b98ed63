"""Runs the application until it is interrupted."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from gemma3n_onnx.runtime.errors import OptionError

from .listener import Listener
from .protocol import TimedProtocol

KEEP_ALIVE_SECONDS = 5
# That a client may take nothing of its answer, which then waits in memory.
WRITE_SECONDS = 60
# For clients to take the last event of their stream.
FLUSH_SECONDS = 2.0


@dataclass(frozen=True)
class Times:
    """Seconds that a request may take to arrive, and that running answers may go on after the first signal."""

    read: float = 30.0
    grace: float = 20.0


def run_app(app: FastAPI, listening: socket.socket, times: Times) -> None:
    """Serves until SIGINT or SIGTERM; a second signal ends the process at once."""
    server_of(app, times).run([listening])


def server_of(app: FastAPI, times: Times) -> uvicorn.Server:
    config = uvicorn.Config(
        app,
        log_level="info",
        loop="asyncio",  # others accept connections past the listener
        http=partial(TimedProtocol, read_seconds=times.read),  # type: ignore[arg-type]
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    return _Server(config, app, times.grace)


class _Server(uvicorn.Server):
    """Ends answers by `app.state.end` when their grace is over. uvicorn would cancel them with a traceback each, and
    raise the signal again at the end."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, grace: float) -> None:
        super().__init__(config)
        self._app, self._grace = app, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_answers())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_answers(self) -> None:
        await asyncio.sleep(self._grace)
        await self._app.state.end()
        await asyncio.sleep(FLUSH_SECONDS)
        for connection in [*self.server_state.connections]:
            connection.transport.abort()  # its client does not read

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.handle_exit)
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self.should_exit = True


def bind(host: str, port: int, connections: int) -> socket.socket:
    """A socket for `run_app` that takes so many connections. Raises OptionError: the address cannot be used."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = Listener(family, kind, protocol, connections)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections inherit it
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, WRITE_SECONDS * 1000)
        listening.bind(address)
    except OSError as error:
        reason = "another program uses the port" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise OptionError(f"Cannot listen on {host}:{port} ({reason}); choose another host or port.") from error
    return listening


def url_of(bound: socket.socket) -> str:
    """The address for this machine's browsers."""
    host, port = bound.getsockname()[:2]
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.is_unspecified:
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    return f"http://{f'[{address}]' if address.version == 6 else address}:{port}"


def is_loopback(host: str) -> bool:
    """Whether a name or an address is reachable from this machine only."""
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return False
    return ipaddress.ip_address(address).is_loopback
