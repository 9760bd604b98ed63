"""Threads for work on one tensor after another."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

_pool: ThreadPoolExecutor | None = None


@contextmanager
def one_thread_an_operation() -> Iterator[ThreadPoolExecutor]:
    """Within, a torch operation takes one thread. Yields as many workers as one took before.

    Threads that share an operation wait for each other at its end: where operations are short, after every few
    microseconds, and beside other work each time until the slowest gets its turn.
    """
    global _pool  # noqa: PLW0603  # as torch's number of threads is
    if _pool is not None:
        yield _pool
        return
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count) as _pool:
            yield _pool
    finally:
        _pool = None
        torch.set_num_threads(count)
