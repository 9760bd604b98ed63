"""A contestant in a process of its own: waits for requests, runs them, and tells how long they took.

Every contestant's module ends in `serve(load)`. Requests and answers are JSON lines; the first answer is about
loading.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol


class Contestant(Protocol):
    def run(self, ids: Sequence[int], new_tokens: int, made: Callable[[int], None]) -> None:
        """Forgets what was before, runs the prompt, and calls `made` with each of the likeliest next tokens."""


def serve(load: Callable[[], Contestant]) -> None:
    # Libraries print what they like: answers go to the stream that was standard output, and their prints elsewhere.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    before = _memory()
    started = time.perf_counter()
    contestant = load()
    _answer(answers, load_seconds=time.perf_counter() - started)
    for line in sys.stdin:
        request = json.loads(line)
        tokens: list[int] = []
        times = [time.perf_counter()]

        def made(token: int) -> None:
            times.append(time.perf_counter())  # noqa: B023
            tokens.append(token)  # noqa: B023

        contestant.run(request["ids"], request["new_tokens"] + 1, made)
        memory = {f"{name}_bytes": size - before[name] for name, size in _memory().items()}
        seconds = {"prefill_seconds": times[1] - times[0], "decode_seconds": times[-1] - times[1]}
        _answer(answers, tokens=tokens, **seconds, **memory)


def _answer(stream: Any, **values: Any) -> None:
    print(json.dumps(values), file=stream, flush=True)


def _memory() -> dict[str, int]:
    """Resident bytes of this process: private ones, and those of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {key: int(value.split()[0]) * 1024 for key, value in (line.split(":", 1) for line in lines) if "Rss" in key}
    return {"private": found["RssAnon"], "mapped": found["RssFile"]}
