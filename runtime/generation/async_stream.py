"""A stream whose steps run in threads, for asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from .result import GenerationResult
from .stream import GenerationStream


class AsyncGenerationStream:
    """Iterate with `async for` for pieces of text; `result` as of `GenerationStream`.

    Media are read and graphs run in threads, so the event loop stays free. If the task that awaits a piece is
    cancelled, generation ends at the next step.
    """

    def __init__(self, begin: Callable[[], GenerationStream]) -> None:
        self._begin = begin
        self._stream: GenerationStream | None = None
        self._closed = False
        self._step = threading.Lock()
        """Held during a step: the thread of a cancelled task goes on until its end."""

    def __aiter__(self) -> AsyncGenerationStream:
        return self

    async def __anext__(self) -> str:
        try:
            piece = await asyncio.to_thread(self._next)
        except asyncio.CancelledError:
            self._cancel()
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        """Ends generation early, after the step that runs."""
        self._cancel()
        await asyncio.to_thread(self._close)

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
        with self._step:
            if self._stream is None and not self._closed:
                self._stream = self._begin()
            return None if self._stream is None or self._closed else next(self._stream, None)

    def _cancel(self) -> None:
        self._closed = True
        if self._stream is not None:
            self._stream.cancel()

    def _close(self) -> None:
        with self._step:
            if self._stream is not None:
                self._stream.close()
