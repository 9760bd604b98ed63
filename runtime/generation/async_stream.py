"""A stream whose steps run in threads, for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from .result import GenerationResult
from .stream import GenerationStream

Value = TypeVar("Value")


class AsyncGenerationStream:
    """Iterate with `async for` for pieces of text; `result` as of `GenerationStream`.

    Media are read and graphs run in threads, so the event loop stays free. If the task that awaits a piece is
    cancelled, generation ends at the next step.
    """

    def __init__(self, begin: Callable[[], GenerationStream]) -> None:
        self._begin = begin
        self._stream: GenerationStream | None = None
        self._closed = False

    def __aiter__(self) -> AsyncGenerationStream:
        return self

    async def __anext__(self) -> str:
        piece = None if self._closed else await self._in_thread(self._next)
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        """Ends generation early."""
        self._closed = True
        if self._stream is not None:
            await self._in_thread(self._stream.close)

    async def finished(self) -> GenerationStream:
        """The stream, once it has ended."""
        async for _ in self:
            pass
        assert self._stream is not None
        return self._stream

    @property
    def result(self) -> GenerationResult:
        """Raises RuntimeError before the first piece has been awaited."""
        if self._stream is None:
            raise RuntimeError("The stream has not begun; iterate it first.")
        return self._stream.result

    def _next(self) -> str | None:
        if self._stream is None:
            self._stream = self._begin()
        return next(self._stream, None)

    async def _in_thread(self, call: Callable[[], Value]) -> Value:
        try:
            return await asyncio.to_thread(call)
        except asyncio.CancelledError:
            self._closed = True
            if self._stream is not None:
                self._stream.cancel()
            raise
