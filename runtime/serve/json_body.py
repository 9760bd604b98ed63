"""JSON from clients. Its size is counted in the text, before a parser makes an object of each value."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from gemma3n_onnx.runtime.errors import Gemma3nError

MAX_VALUES = 100_000
MAX_DEPTH = 128
_NO_BRACKETS = bytes({*range(256)} - {*b"[]{}"})
_SHORT = 256 * 1024  # bytes that are parsed within milliseconds
_PARSER = ThreadPoolExecutor(1, thread_name_prefix="json")  # one at a time: parsing holds the interpreter lock


class JsonError(Gemma3nError, ValueError):
    """A client's JSON is malformed, or has too many values."""


def parse_json(data: bytes, what: str = "The body") -> Any:
    """The value of JSON in UTF-8; `what` begins error messages.

    Raises:
        JsonError: it is not JSON, has more than `MAX_VALUES` values, nests deeper than `MAX_DEPTH`, or has a lone
        surrogate.
    """
    _require_size(data, what)
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise JsonError(f"{what} is not UTF-8 text; send JSON in UTF-8.") from error
    except json.JSONDecodeError as error:
        raise JsonError(f"{what} is not JSON: {error.msg} at character {error.pos}; correct it.") from error
    except ValueError as error:
        raise JsonError(f"{what} has an integer of too many digits; send a smaller number.") from error
    if b"\\ud" in data or b"\\uD" in data:
        _require_unicode(value, what)
    return value


def _require_size(data: bytes, what: str) -> None:
    unescaped = data.replace(rb"\\", b"").replace(rb"\"", b"")
    too_many = JsonError(f"{what} has more than {MAX_VALUES:,} values; send fewer.")
    if unescaped.count(b'"') > 4 * MAX_VALUES:  # a name and a text for each value
        raise too_many
    outside = b"".join(unescaped.split(b'"')[::2])
    if sum(map(outside.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise too_many
    brackets = outside.translate(None, _NO_BRACKETS)[: 2 * MAX_VALUES]
    if max(accumulate(1 if bracket in b"[{" else -1 for bracket in brackets), default=0) > MAX_DEPTH:
        raise JsonError(f"{what} nests deeper than {MAX_DEPTH} levels; send a flatter one.")


def _require_unicode(value: Any, what: str) -> None:
    try:
        for text in strings_in(value):
            text.encode()
    except UnicodeEncodeError as error:
        raise JsonError(f"{what} contains a lone surrogate; send valid Unicode.") from error


def strings_in(value: Any) -> Iterator[str]:
    """Every string of a JSON value, names included."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, list):
            waiting += each
        elif isinstance(each, dict):
            waiting += [*each, *each.values()]


class _ParsedRequest(Request):
    """A request whose JSON has been parsed. The bytes are not kept."""

    def __init__(self, request: Request, value: Any, *, empty: bool) -> None:
        super().__init__(request.scope, request.receive)
        self._value, self._empty = value, empty

    async def body(self) -> bytes:
        return b"" if self._empty else b"null"  # FastAPI asks only whether there is any

    async def json(self) -> Any:
        return self._value


class JsonRoute(APIRoute):
    """A route that parses JSON with `parse_json`, a long body in a thread."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def parsed(request: Request) -> Response:
            if self.body_field is None:
                return await handle(request)
            value, empty = await _read(request)
            return await handle(_ParsedRequest(request, value, empty=empty))

        return parsed


async def _read(request: Request) -> tuple[Any, bool]:
    """The value of the body, and whether there is no body."""
    try:
        body = b"".join([chunk async for chunk in request.stream()])
    except ClientDisconnect as error:
        raise HTTPException(499, "The client disconnected.") from error
    if len(body) <= _SHORT:
        return (parse_json(body), False) if body else (None, True)
    return await asyncio.get_running_loop().run_in_executor(_PARSER, parse_json, body), False
