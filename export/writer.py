"""The output folder, made atomically: under its final name it is either whole or not there."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from gemma3n_onnx.runtime.artifact import FileInfo

from .errors import ExportError

ALIGNMENT = 4096  # of large tensors, so that they can be mapped in place


@contextlib.contextmanager
def staged(output: Path, *, force: bool, needed_bytes: int) -> Iterator[Path]:
    """A temporary sibling of `output` to write into; renamed to `output` when the block ends well.

    On any failure, SIGTERM included, the sibling is removed and an existing `output` stays as it was.
    Leftovers of exports that were killed are removed at the start.

    Raises:
        ExportError: `output` exists and `force` is false, no permission, or too little disk space.
    """
    output = output.absolute()
    if output.exists() and not force:
        raise ExportError(f"{output} exists; give another --output, or --force to replace it.")
    if output.exists() and not output.is_dir():
        raise ExportError(f"{output} is not a folder, so it will not be replaced; give another --output.")
    stage = output.parent / f".{output.name}.{os.getpid()}.partial"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        _check_space(output.parent, needed_bytes)
        stage.mkdir()
    except OSError as error:
        raise ExportError(f"Cannot write to {output.parent} ({error.strerror}).") from error
    try:
        with _terminate_as_exception():
            yield stage
            _sync(stage)
            _put_in_place(stage, output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ExportError(f"The disk of {output.parent} is full; free some space and export again.") from error
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


class HashedFile:
    """A file being written in order, with its SHA-256 kept along."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._digest = hashlib.sha256()
        self._stream: BinaryIO = path.open("wb")

    def write(self, data: bytes | memoryview) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self.size += len(data)

    def align(self, alignment: int) -> None:
        if padding := -self.size % alignment:
            self.write(bytes(padding))

    def close(self) -> FileInfo:
        self._stream.close()
        return FileInfo(self.size, self._digest.hexdigest())


def file_info(path: Path) -> FileInfo:
    with path.open("rb") as stream:
        return FileInfo(path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())


def _remove_leftovers(output: Path) -> None:
    for leftover in output.parent.glob(f".{output.name}.*.partial"):
        owner = leftover.name.removesuffix(".partial").rpartition(".")[2]
        if owner.isdigit() and not _is_running(int(owner)):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_running(pid: int) -> bool:
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
            f"The export needs {needed / 1e9:.1f} GB and the disk of {folder} has {free / 1e9:.1f} GB free; "
            "free some space or give another --output."
        )


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def _put_in_place(stage: Path, output: Path) -> None:
    if not output.exists():
        stage.rename(output)
    elif not _exchange(stage, output):
        old = stage.with_suffix(".old")
        output.rename(old)
        stage.rename(output)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two folders in one step (Linux renameat2 with RENAME_EXCHANGE); False where that is missing."""
    at_current_folder, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return renameat2(at_current_folder, os.fsencode(a), at_current_folder, os.fsencode(b), rename_exchange) == 0


@contextlib.contextmanager
def _terminate_as_exception() -> Iterator[None]:
    """SIGTERM unwinds the stack like Ctrl-C does, so that clean-up runs."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    try:
        previous = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: its owner decides about signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
