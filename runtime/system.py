"""The cache folder; memory statistics and mapped files, from the operating system, None or empty if unavailable.

`process` is a process id, None for this process. All statistics but the peak need Linux.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """`GEMMA3N_CACHE`, by default `~/.cache/gemma3n-onnx`; it may be deleted at any time. RuntimeError: neither is set
    nor known."""
    return Path(os.environ.get("GEMMA3N_CACHE") or Path.home() / ".cache" / "gemma3n-onnx")


def available_memory_bytes() -> int | None:
    """Available memory of the machine."""
    return _sizes("meminfo").get("MemAvailable")


def resident_memory_bytes(process: int | None = None) -> int | None:
    """Resident memory of a process, mapped files included."""
    return _sizes(_of(process, "status")).get("VmRSS")


def private_memory_bytes(process: int | None = None) -> int | None:
    """Resident memory of a process that is not backed by a file."""
    return _sizes(_of(process, "status")).get("RssAnon")


def mapped_memory_bytes(process: int | None = None) -> int | None:
    """Resident memory of a process that is backed by mapped files; the kernel may reclaim it."""
    return _sizes(_of(process, "status")).get("RssFile")


def peak_memory_bytes() -> int | None:
    """Peak resident memory of this process, mapped files included."""
    # `ru_maxrss` starts from the resident size of the parent when it started this process.
    if peak := _sizes(_of(None, "status")).get("VmHWM"):
        return peak
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def open_files_limit() -> int | None:
    """Files and sockets that this process may open; None if there is no limit, or it is not known."""
    try:
        import resource
    except ImportError:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if limit == resource.RLIM_INFINITY else limit


def mapped_files() -> list[str]:
    """Paths of the files that this process has mapped, libraries included; may have duplicates."""
    rows = (line.split(maxsplit=5) for line in _lines(_of(None, "maps")))
    return [row[5] for row in rows if len(row) == 6 and row[5].startswith("/")]


def _of(process: int | None, file: str) -> str:
    return f"{'self' if process is None else process}/{file}"


def _sizes(file: str) -> dict[str, int]:
    """The lines `name: number kB` of a /proc file, in bytes."""
    rows = (line.split() for line in _lines(file))
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row[-1:] == ["kB"]}


def _lines(file: str) -> list[str]:
    try:
        return (Path("/proc") / file).read_text().splitlines()
    except OSError:
        return []
