"""Data made by processes beside this one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

A = TypeVar("A")
R = TypeVar("R")


def in_processes(function: Callable[[A], R], arguments: Iterable[A]) -> list[R]:
    """`function` of each argument, in order.

    The processes are forked from a server without threads. A copy of this process would have torch's locks and none of
    their threads; with torch 2.14 such a copy crashes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        return list(pool.map(function, arguments))
