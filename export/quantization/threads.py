"""A thread pool for single-threaded torch operations."""

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
    """In this context a torch operation uses one thread; yields a pool of as many workers as torch had threads.

    Threads that share an operation synchronize at its end. With short operations, that is every few microseconds, and
    on a busy machine each barrier waits for the slowest thread.
    """
    pool = _enter()
    try:
        yield pool
    finally:
        _leave()


# One pool for the process, because torch's number of threads is global; shared by nested and concurrent contexts.
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
