"""Threads for work on one tensor after another."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_workers = 0
_users = 0


@contextmanager
def one_thread_an_operation() -> Iterator[ThreadPoolExecutor]:
    """Within, a torch operation takes one thread. Yields as many workers as one took before.

    Threads that share an operation wait for each other at its end: where operations are short, after every few
    microseconds, and beside other work each time until the slowest gets its turn.
    """
    pool = _enter()
    try:
        yield pool
    finally:
        _leave()


# The pool belongs to the process, as torch's number of threads does, and to whoever is within.
def _enter() -> ThreadPoolExecutor:
    global _pool, _workers, _users  # noqa: PLW0603
    with _lock:
        if _pool is None:
            _workers = torch.get_num_threads()
            _pool = ThreadPoolExecutor(_workers)
            torch.set_num_threads(1)
        _users += 1
        return _pool


def _leave() -> None:
    global _pool, _users  # noqa: PLW0603
    with _lock:
        _users -= 1
        if _users == 0 and _pool is not None:
            _pool.shutdown(cancel_futures=True)
            torch.set_num_threads(_workers)
            _pool = None
