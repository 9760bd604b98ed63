"""A stack for llguidance, which follows chains of references recursively: 13 KB for each level of a schema."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

STACK_BYTES = 256 << 20  # reserved, not used; an ordinary stack has 8 MB
_T = TypeVar("_T")
_one = threading.Lock()


def with_deep_stack(call: Callable[[], _T]) -> _T:
    """What `call` returns or raises in a thread with a stack of `STACK_BYTES`; one at a time, to bound memory."""
    result: Future[_T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    with _one:
        before = threading.stack_size(STACK_BYTES)
        thread = threading.Thread(target=run, name="grammar")
        try:
            thread.start()
        finally:
            threading.stack_size(before)
        thread.join()
    return result.result()
