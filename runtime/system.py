"""What the operating system tells of memory and mapped files; None, or nothing, where it does not tell.

A process is given by its id, and is this one by default. All but the peak are Linux's.
"""

from __future__ import annotations

import sys
from pathlib import Path


def available_memory_bytes() -> int | None:
    """Memory of the machine that programs may still take."""
    return _sizes("meminfo").get("MemAvailable")


def resident_memory_bytes(process: int | None = None) -> int | None:
    """What of a process is in memory, mapped files included."""
    return _sizes(_of(process, "status")).get("VmRSS")


def private_memory_bytes(process: int | None = None) -> int | None:
    """What of a process is in memory and no part of a file."""
    return _sizes(_of(process, "status")).get("RssAnon")


def mapped_memory_bytes(process: int | None = None) -> int | None:
    """What of the files that a process has mapped is in memory; the system may drop it."""
    return _sizes(_of(process, "status")).get("RssFile")


def peak_memory_bytes() -> int | None:
    """The largest resident size of this process so far, mapped files included."""
    # The count that `resource` has begins with what the parent held when it started this process.
    if peak := _sizes(_of(None, "status")).get("VmHWM"):
        return peak
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def mapped_files() -> list[str]:
    """The paths of the files that this process has mapped, libraries included; a file may come more than once."""
    rows = (line.split(maxsplit=5) for line in _lines(_of(None, "maps")))
    return [row[5] for row in rows if len(row) == 6 and row[5].startswith("/")]


def _of(process: int | None, file: str) -> str:
    return f"{'self' if process is None else process}/{file}"


def _sizes(file: str) -> dict[str, int]:
    """The lines `name: number kB` of a file of /proc, in bytes."""
    rows = (line.split() for line in _lines(file))
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row[-1:] == ["kB"]}


def _lines(file: str) -> list[str]:
    try:
        return (Path("/proc") / file).read_text().splitlines()
    except OSError:
        return []
