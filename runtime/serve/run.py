"""Runs the application until it is interrupted."""

from __future__ import annotations

import errno
import ipaddress
import socket

import uvicorn
from fastapi import FastAPI

from gemma3n_onnx.runtime.errors import OptionError


def run_app(app: FastAPI, host: str, port: int) -> None:
    """Raises OptionError if the address cannot be used."""
    sockets = [_listen(host, port)]
    uvicorn.Server(uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=5)).run(sockets)


def is_loopback(host: str) -> bool:
    """Whether a name or an address is reachable from this machine only."""
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return False
    return ipaddress.ip_address(address).is_loopback


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        reason = "another program uses the port" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise OptionError(f"Cannot listen on {host}:{port} ({reason}); choose another host or port.") from error
    return listening
