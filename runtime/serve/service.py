"""What every endpoint shares: acquiring a model, reading a request, answering it whole or as a stream."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from gemma3n_onnx.runtime.errors import Gemma3nError
from gemma3n_onnx.runtime.media.budget import MediaLimits

from .answering import AnswerEvent, Answering, Choice, ParsedRequest, collect
from .errors import status_and_body
from .metrics import Metrics
from .model_pool import ModelPool, Served
from .reading import Readable, Readers, ReadingLimits, while_connected

# A comment that keeps proxies from closing a stream that is silent while a long prompt runs.
KEEP_ALIVE = ": keep-alive\n\n"
KEEP_ALIVE_SECONDS = 15.0
_Request = TypeVar("_Request", bound=Readable)
_Parsed = TypeVar("_Parsed")


@dataclass(frozen=True)
class Limits:
    """`body_bytes` and `media` of one request, `seconds` that it may take, and how many are `reading` at once."""

    body_bytes: int = 64 << 20
    seconds: float = 600.0
    media: MediaLimits = field(default_factory=MediaLimits)
    reading: ReadingLimits = field(default_factory=ReadingLimits)


class ServerSentEvents:
    """OpenAI's form: nameless events, and a last one [DONE]."""

    end = "data: [DONE]\n\n"

    def event(self, value: Any) -> str:
        return f"data: {json.dumps(value)}\n\n"

    def error(self, error: Gemma3nError) -> str:
        return self.event(status_and_body(error)[1])


class NamedEvents(ServerSentEvents):
    """Events named by their type; none ends the stream."""

    end = ""

    def event(self, value: Any) -> str:
        return f"event: {value['type']}\n{super().event(value)}"


class StreamFormat(Protocol):
    """The chunks of a streamed answer, as JSON values."""

    @property
    def sse(self) -> ServerSentEvents:
        """How they are written."""

    def first(self) -> Iterable[Any]:
        """Before the first event."""

    def next(self, index: int, event: AnswerEvent) -> Iterable[Any]:
        """After an event of the choice `index`."""

    def last(self) -> Iterable[Any]:
        """After the last event."""


class Service:
    """Acquires models for the duration of a request, and enforces its time limit."""

    def __init__(self, pool: ModelPool, limits: Limits) -> None:
        self.pool, self.metrics = pool, Metrics(pool)
        self._limits = limits
        # Requests for a model that is loading wait here, not in a thread each.
        self._acquiring = {name: asyncio.Lock() for name in pool.folders}
        self._readers = Readers(limits.reading, limits.media)

    async def close(self) -> None:
        await asyncio.to_thread(self.pool.close)
        self._readers.close()

    @asynccontextmanager
    async def held(self, name: str) -> AsyncIterator[Served]:
        """The model `name`, loaded. A stream outlives this context and retains the model itself."""
        name = self.pool.resolve(name)
        async with self._acquiring[name]:
            served = await asyncio.to_thread(self.pool.acquire, name)
        try:
            yield served
        finally:
            self.pool.release(served)

    async def unload(self, name: str, *, encoders: bool) -> bool:
        """Frees a model, or only its encoders; False if it is not loaded. Errors as of `ModelPool.unload`."""
        return await asyncio.to_thread(self.pool.release_encoders if encoders else self.pool.unload, name)

    async def reserve_scorer(self, served: Served) -> None:
        """Makes room for a model's scorer. Errors as of `ModelPool.reserve_scorer`."""
        await asyncio.to_thread(self.pool.reserve_scorer, served)

    async def read(
        self, reader: Callable[[_Request, Served], _Parsed], request: _Request, served: Served, http: Request
    ) -> _Parsed:
        """What `reader` makes of a request, with its constraint compiled. Errors as of `Readers.read`."""
        deadline = self.deadline(http)
        parsed = await self._readers.read(partial(reader, request, served), request, http, deadline)
        if isinstance(parsed, ParsedRequest) and parsed.constrain is not None:
            return await self._readers.compile(parsed.constrained, http, deadline)
        return parsed

    def deadline(self, http: Request) -> float:
        """When the request has to be answered, from the first time this is asked; a time of `time.monotonic`."""
        if not hasattr(http.state, "deadline"):
            http.state.deadline = time.monotonic() + self._limits.seconds
        return http.state.deadline

    async def answer(self, parsed: ParsedRequest, served: Served, http: Request) -> list[Choice]:
        """The complete answer; cancelled when the client disconnects."""
        answering = self._begin(parsed, served, http)
        collecting = asyncio.ensure_future(collect(answering))
        try:
            return await while_connected(collecting, http)
        except Gemma3nError as error:
            self.metrics.failed(error)
            raise
        finally:
            collecting.cancel()
            answering.cancel()

    def stream(self, parsed: ParsedRequest, served: Served, chunks: StreamFormat, http: Request) -> StreamingResponse:
        """The answer as server-sent events in the form of `chunks`."""
        answering = self._begin(parsed, served, http)

        async def events() -> AsyncIterator[Any]:
            for chunk in chunks.first():
                yield chunk
            async for index, event in answering.events():
                for chunk in chunks.next(index, event):
                    yield chunk
            for chunk in chunks.last():
                yield chunk

        return self.stream_events(events(), served, chunks.sse, answering.cancel)

    def stream_events(
        self,
        events: AsyncIterator[Any],
        served: Served,
        sse: ServerSentEvents | None = None,
        cancel: Callable[[], None] | None = None,
    ) -> StreamingResponse:
        """Server-sent events; holds the model until the stream ends, and calls `cancel` then."""
        sse = sse or ServerSentEvents()
        self.pool.retain(served)

        async def lines() -> AsyncIterator[str]:
            try:
                async for event in _with_pauses(events, KEEP_ALIVE_SECONDS):
                    yield KEEP_ALIVE if event is None else sse.event(event)
                yield sse.end
            except Gemma3nError as error:
                self.metrics.failed(error)
                yield sse.error(error)

        def done() -> None:
            if cancel is not None:
                cancel()
            self.pool.release(served)

        return _Stream(lines(), done)

    def _begin(self, parsed: ParsedRequest, served: Served, http: Request) -> Answering:
        return Answering(parsed, served, self.deadline(http), self.metrics.first_token)


class _Stream(StreamingResponse):
    """Server-sent events; `done` is always called, even if the stream never starts."""

    def __init__(self, lines: AsyncIterator[str], done: Callable[[], None]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()


async def _with_pauses(events: AsyncIterator[Any], seconds: float) -> AsyncIterator[Any]:
    """The events, and None whenever none has come for so long."""
    ended = object()
    coming = asyncio.ensure_future(anext(events, ended))
    try:
        while True:
            await asyncio.wait([coming], timeout=seconds)
            if not coming.done():
                yield None
            elif (event := coming.result()) is ended:
                return
            else:
                coming = asyncio.ensure_future(anext(events, ended))
                yield event
    finally:
        coming.cancel()
