"""Server-sent events while nothing happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gemma3n_onnx.runtime.serve.service import _with_pauses


async def slow(*waits: float) -> AsyncIterator[int]:
    for number, seconds in enumerate(waits):
        await asyncio.sleep(seconds)
        yield number


async def collected(events: AsyncIterator[Any], seconds: float) -> list[Any]:
    return [event async for event in _with_pauses(events, seconds)]


def test_a_silent_stream_is_kept_alive() -> None:
    events = asyncio.run(collected(slow(0, 0.5, 0), 0.2))
    assert events == [0, None, None, 1, 2]


def test_a_failure_comes_through() -> None:
    async def failing() -> AsyncIterator[int]:
        yield 0
        raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        asyncio.run(collected(failing(), 1))


def test_a_stream_that_is_closed_ends_its_events() -> None:
    ended = []

    async def endless() -> AsyncIterator[int]:
        try:
            while True:
                yield 0
                await asyncio.sleep(0.01)
        finally:
            ended.append(True)

    async def run() -> None:
        stream = _with_pauses(endless(), 1)
        await anext(stream)
        await stream.aclose()
        await asyncio.sleep(0.05)

    asyncio.run(run())
    assert ended
