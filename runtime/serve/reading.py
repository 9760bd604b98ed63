"""The threads that read requests and compile their constraints, and how long each may take."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from fastapi import Request
from starlette.exceptions import HTTPException

from gemma3n_onnx.runtime.errors import DeadlineError
from gemma3n_onnx.runtime.media.budget import MediaBudget, MediaLimits

from .worker import BusyError

POLL_SECONDS = 0.25
_Result = TypeVar("_Result")


class Readable(Protocol):
    @property
    def has_media(self) -> bool:
        """Whether reading it may wait for URLs and decoders."""


@dataclass(frozen=True)
class ReadingLimits:
    """Requests that are read at once: without media, with media, and with media that wait for a thread."""

    text: int = 8
    media: int = 16
    queue: int = 64


class Readers:
    """Requests with media are read in threads of their own, so that slow URLs do not delay others."""

    def __init__(self, limits: ReadingLimits, media: MediaLimits) -> None:
        self._limits, self._media_limits = limits, media
        self._text = ThreadPoolExecutor(limits.text, thread_name_prefix="reader")
        self._media = ThreadPoolExecutor(limits.media, thread_name_prefix="media")
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="compiler")
        self._with_media = 0

    def close(self) -> None:
        for pool in (self._text, self._media, self._compiler):
            pool.shutdown(wait=False, cancel_futures=True)

    async def read(self, work: Callable[[], _Result], request: Readable, http: Request, deadline: float) -> _Result:
        """The result of `work`, which reads `request`; it is told to stop when the client goes or time is over.

        Raises:
            BusyError: too many requests with media. DeadlineError: time is over. HTTPException: the client left.
        """
        if not request.has_media:
            return await self._run(self._text, work, http, deadline)
        if self._with_media >= self._limits.media + self._limits.queue:
            raise BusyError("The server is reading the media of too many requests; try again later.")
        self._with_media += 1
        try:
            return await self._run(self._media, work, http, deadline)
        finally:
            self._with_media -= 1

    async def compile(self, work: Callable[[], _Result], http: Request, deadline: float) -> _Result:
        """The result of `work`, which compiles a constraint: one at a time, while other requests are read.

        Raises:
            DeadlineError: time is over. HTTPException: the client left.
        """
        compiling = asyncio.get_running_loop().run_in_executor(self._compiler, work)
        try:
            return await while_connected(compiling, http, deadline)
        finally:
            compiling.cancel()

    async def _run(
        self, pool: ThreadPoolExecutor, work: Callable[[], _Result], http: Request, deadline: float
    ) -> _Result:
        budget = MediaBudget(self._media_limits, deadline)

        def limited() -> _Result:
            with budget.active():
                return work()

        reading = asyncio.get_running_loop().run_in_executor(pool, limited)
        try:
            return await while_connected(reading, http, deadline)
        finally:
            reading.cancel()
            budget.cancel()


async def while_connected(work: asyncio.Future[_Result], http: Request, deadline: float = float("inf")) -> _Result:
    """The result of `work`. HTTPException 499: the client disconnected. DeadlineError: `deadline` has passed."""
    while not work.done():
        await asyncio.wait([work], timeout=max(0, min(POLL_SECONDS, deadline - time.monotonic())))
        if not work.done() and await http.is_disconnected():
            raise HTTPException(499, "The client disconnected.")
        if not work.done() and time.monotonic() > deadline:
            raise DeadlineError(
                "Reading the request took longer than this server allows; send smaller media or a smaller schema."
            )
    return work.result()
