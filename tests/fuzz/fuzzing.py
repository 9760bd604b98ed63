"""Tries mutants in a child process, which a crash or a hang does not take along, and reports what went wrong.

    python tests/fuzz/fuzzing.py INPUTS TARGET FIRST COUNT

tries COUNT mutants in this process. A mutant is wrong if it ends the process, hangs, takes too much time or memory,
raises anything but the project's errors, or is answered wrongly.
"""

from __future__ import annotations

import contextlib
import json
import random
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "fuzz")]

from gemma3n_onnx.runtime.errors import Gemma3nError  # noqa: E402
from gemma3n_onnx.runtime.system import peak_memory_bytes  # noqa: E402
from targets import TARGETS, Target, is_one_sentence  # noqa: E402

SILENT_SECONDS = 300.0
"""After so long without a word from the child, on a busy machine, a mutant hangs."""


@dataclass
class Report:
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)


def fuzz(name: str, inputs: Path, first: int, count: int, keep: Path | None = None) -> Report:
    """Tries the mutants of `count` seeds from `first` on. Wrong ones are kept in a folder of their own in `keep`, with
    what happened."""
    report, seed = Report(), first
    while seed < first + count:
        seed = _run_child(name, inputs, seed, first + count - seed, report)
    for failed, reason in report.failures.items() if keep is not None else ():
        folder = keep / f"{name}-{failed}"
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            make(TARGETS[name](inputs), failed, folder)
            (folder / "outcome.txt").write_text(reason + "\n", encoding="utf-8", errors="replace")
    return report


def make(target: Target, seed: int, folder: Path) -> None:
    target.make(random.Random(f"{target.name} {seed}"), folder)


def _run_child(name: str, inputs: Path, first: int, count: int, report: Report) -> int:
    """Runs a child until it has ended; returns the first seed that it has not tried."""
    command = [sys.executable, __file__, str(inputs), name, str(first), str(count)]
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        seed, begun = first, False
        for line in _lines(child):
            if line is None:
                child.kill()
                report.failures[seed] = f"hangs: no outcome after {SILENT_SECONDS:g} s"
                break
            said = json.loads(line)
            begun = True
            if "outcome" in said:
                report.outcomes[said["outcome"]] += 1
            if "failure" in said:
                report.failures[said["seed"]] = said["failure"]
            seed = said["seed"] if "begins" in said else said["seed"] + 1
        code = child.wait()
        if code and seed not in report.failures:
            errors.seek(0)
            told = errors.read()[-2000:].decode(errors="replace")
            if not begun:
                raise RuntimeError(f"the child ended with {code} before the first mutant: {told}")
            report.failures[seed] = f"ends the process with {code}: {told}"
        return seed + 1 if code else seed


def _lines(child: subprocess.Popen[str]) -> Iterator[str | None]:
    """Lines of its output; None if none comes for too long."""
    assert child.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(SILENT_SECONDS):
                yield None
                return
            if not (line := child.stdout.readline()):
                return
            yield line


def _child(inputs: Path, name: str, first: int, count: int) -> None:
    target = TARGETS[name](inputs)
    target.warm_up()
    for seed in range(first, first + count):
        _say(seed=seed, begins=True)
        with tempfile.TemporaryDirectory(dir=inputs.parent) as folder:
            make(target, seed, Path(folder))
            _say(seed=seed, **_try(target, Path(folder)))


def _try(target: Target, folder: Path) -> dict[str, str]:
    _reset_peak()
    before, started = peak_memory_bytes() or 0, time.process_time()
    try:
        outcome = {"outcome": target.attempt(folder)}
    except Gemma3nError as error:
        outcome = {"outcome": "refused"} if is_one_sentence(error) else {"failure": f"not one sentence: {error}"[:2000]}
    except Exception as error:  # whatever else is a failure, and the next mutant is tried
        outcome = {"failure": f"{type(error).__name__}: {error}"[:2000]}
    if (seconds := time.process_time() - started) > target.most_seconds:
        outcome = {"failure": f"takes {seconds:.1f} s of processor time"}
    if (grown := (peak_memory_bytes() or 0) - before) > target.most_bytes:
        outcome = {"failure": f"takes {grown >> 20} MiB"}
    return outcome


def _reset_peak() -> None:
    """Of this process's resident memory (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def main() -> None:
    inputs, name, first, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    _child(inputs, name, first, count)


if __name__ == "__main__":
    main()
