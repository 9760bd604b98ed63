"""Writes an output folder atomically: under its final name it is complete or absent."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from gemma3n_onnx.runtime.artifact import FileInfo
from gemma3n_onnx.runtime.errors import Gemma3nError

from .errors import ExportError

ALIGNMENT = 4096  # bytes; large tensors are page-aligned, so that they can be mapped


@dataclass(frozen=True)
class OutputKind:
    """`markers` are globs: `--force` replaces only a folder with a match of one, or an empty folder."""

    name: str
    markers: tuple[str, ...]


CHECKPOINT = OutputKind("checkpoint", ("model.safetensors", "model.safetensors.index.json"))


def check_output(output: Path, *, force: bool, kind: OutputKind) -> Path:
    """`output` as an absolute path, with links resolved.

    Raises:
        ExportError: it exists and may not be replaced, or no folder can be created there.
    """
    try:
        output = output.resolve()
        exists = output.exists()
        ancestor = next(folder for folder in output.parents if folder.exists())
        if exists and not force:
            raise ExportError(f"{output} exists already; give another output folder, or replace it with --force.")
        if exists and not output.is_dir():
            raise ExportError(f"{output} is a file and will not be replaced; give another output folder.")
        if exists and any(output.iterdir()) and not any(any(output.glob(name)) for name in kind.markers):
            raise ExportError(
                f"{output} is no {kind.name} (it has no {kind.markers[0]}) and will not be replaced; "
                "give another output folder."
            )
        if not ancestor.is_dir():
            raise ExportError(f"{ancestor} is a file, not a folder; give another output folder.")
        if not os.access(ancestor, os.W_OK | os.X_OK):
            raise ExportError(f"There is no permission to write to {ancestor}; give another output folder.")
    except (OSError, RuntimeError) as error:  # RuntimeError: a symlink loop
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"{output} cannot be the output folder ({_reason(error)}); give another.") from error
    return output


@contextlib.contextmanager
def staged(output: Path, *, force: bool, needed_bytes: int, kind: OutputKind) -> Iterator[Path]:
    """Yields a temporary folder beside `output`, which replaces `output` when the block succeeds.

    On failure, including Ctrl-C and SIGTERM, the temporary folder and the parents created for it are removed, and an
    existing `output` stays unchanged. Leftovers of killed exports are removed first.

    Raises:
        ExportError: as `check_output`; too little disk space, or a write fails.
    """
    output = check_output(output, force=force, kind=kind)
    missing = [folder for folder in output.parents if not folder.exists()]
    stage = output.parent / f".{output.name}.{os.getpid()}.partial"
    done = False
    try:
        with _terminate_as_exception():
            _remove_leftovers(output)
            _check_space(next(folder for folder in output.parents if folder.exists()), needed_bytes)
            stage.mkdir(parents=True)
            yield stage
            _sync(stage)
            with _undisturbed():
                _put_in_place(stage, output)
                done = True
    except Gemma3nError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ExportError(f"The disk of {output.parent} is full; free some space and try again.") from error
        raise ExportError(f"Writing {output} failed ({_reason(error)}); give another output folder.") from error
    finally:
        with _undisturbed():
            shutil.rmtree(stage, ignore_errors=True)
            if not done:
                for folder in missing:
                    with contextlib.suppress(OSError):
                        folder.rmdir()


class HashedFile:
    """A file written sequentially while its SHA-256 is computed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._digest = hashlib.sha256()
        self._stream: BinaryIO = path.open("wb")

    def write(self, data: bytes | memoryview) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self.size += len(data)

    def pad_to(self, size: int) -> None:
        """Appends zeros up to a file size of `size` bytes."""
        self.write(bytes(size - self.size))

    def info(self) -> FileInfo:
        return FileInfo(self.size, self._digest.hexdigest())

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def file_info(path: Path) -> FileInfo:
    with path.open("rb") as stream:
        return FileInfo(path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())


def _remove_leftovers(output: Path) -> None:
    for leftover in sorted(output.parent.glob(f".{glob.escape(output.name)}.*")):
        owner, _, suffix = leftover.name.removeprefix(f".{output.name}.").rpartition(".")
        if suffix not in ("partial", "old") or not owner.isdigit() or _is_running(int(owner)):
            continue
        if suffix == "old" and not output.exists():
            leftover.rename(output)  # killed between the two renames of `_put_in_place`
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _is_running(pid: int) -> bool:
    if sys.platform == "win32":  # os.kill would terminate the process; a leftover folder is harmless
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            f"{needed / 1e9:.1f} GB are needed, but the disk of {folder} has {free / 1e9:.1f} GB free; "
            "free some space or give another output folder."
        )


def _sync(folder: Path) -> None:
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("r+b") as stream:
            os.fsync(stream.fileno())


def _put_in_place(stage: Path, output: Path) -> None:
    if not output.exists():
        stage.rename(output)
    elif not _exchange(stage, output):
        old = stage.with_suffix(".old")
        output.rename(old)
        try:
            stage.rename(output)
        except BaseException:
            old.rename(output)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two folders atomically (Linux renameat2 with RENAME_EXCHANGE); False if that is not supported."""
    at_current_folder, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return renameat2(at_current_folder, os.fsencode(a), at_current_folder, os.fsencode(b), rename_exchange) == 0


_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name)]


@contextlib.contextmanager
def _terminate_as_exception() -> Iterator[None]:
    """In this context SIGTERM and SIGHUP raise SystemExit, so that cleanup runs as after Ctrl-C."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    deadly = [s for s in _SIGNALS if signal.getsignal(s) is signal.SIG_DFL]
    with _handling(deadly, stop):
        yield


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignores signals in this context, so that the last steps are not interrupted."""
    with _handling(_SIGNALS, signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handling(signals: Iterable[int], handler: Any) -> Iterator[None]:
    previous: dict[int, Any] = {}
    try:
        with contextlib.suppress(ValueError):  # only the main thread may set signal handlers
            for number in signals:
                previous[number] = signal.signal(number, handler)
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _reason(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    name = getattr(error, "filename", None)
    return f"{reason}: {name}" if name else reason
