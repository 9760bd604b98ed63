"""Rows of the embedding tables, read from files that stay on disk: a table takes no memory of the process."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np

from .artifact import TableInfo
from .errors import ArtifactError

_STORED = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}


class Table:
    """A row-major table on disk. Rows are read, not mapped: a mapping costs resident memory in whole pages
    (with large folios in megabytes) around every row, and a truncated file would end the process."""

    def __init__(self, folder: Path, info: TableInfo, compute_dtype: str) -> None:
        self.info = info
        self._compute = compute_dtype
        self._file = (folder / info.file).open("rb", buffering=0)
        self._lock = threading.Lock()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """ids [n] int64 -> rows [n, width], scaled, in the compute dtype (bf16 as uint16 bits).

        Raises:
            ArtifactError: the file has become shorter than its manifest says.
        """
        stored = np.empty((len(ids), self.info.width), dtype=_STORED[self.info.dtype])
        row_bytes = stored.strides[0]
        for row, table_row in zip(stored, ids.tolist()):
            self._read_into(row.data.cast("B"), table_row * row_bytes)
        if self._compute == "fp16":
            return stored.astype(np.float16, copy=False) * np.float16(self.info.scale)
        return to_compute_dtype(_widen(stored, self.info.dtype) * np.float32(self.info.scale), self._compute)

    def _read_into(self, row: memoryview, offset: int) -> None:
        if hasattr(os, "preadv"):
            count = os.preadv(self._file.fileno(), [row], offset)
        else:
            with self._lock:
                self._file.seek(offset)
                count = self._file.readinto(row) or 0
        if count != len(row):
            raise ArtifactError(f"{self.info.file} is shorter than its manifest says; copy or export it again.")


def _widen(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bf16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def to_compute_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 values as fp32, as fp16, or as bf16 bits in uint16, rounded to nearest even."""
    if dtype != "bf16":
        return values.astype(np.float16 if dtype == "fp16" else np.float32, copy=False)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
