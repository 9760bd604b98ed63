"""Rows of the embedding tables, read from memory-mapped files: resident are the rows touched, no more."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from .artifact import TableInfo

_STORED = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}


class Table:
    """A row-major table on disk. Random access is announced, or the kernel reads ahead of every row."""

    def __init__(self, folder: Path, info: TableInfo, compute_dtype: str) -> None:
        self.info = info
        self._compute = compute_dtype
        with (folder / info.file).open("rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_RANDOM)
        values = np.frombuffer(self._map, dtype=_STORED[info.dtype], count=info.rows * info.width)
        self._values = values.reshape(info.rows, info.width)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """ids [n] int64 -> rows [n, width], scaled, in the compute dtype (bf16 as uint16 bits)."""
        stored = self._values[ids]
        if self._compute == "bf16":
            return narrow_to_bf16(_widen(stored, self.info.dtype) * np.float32(self.info.scale))
        if self._compute == "fp16":
            return stored.astype(np.float16, copy=False) * np.float16(self.info.scale)
        return _widen(stored, self.info.dtype) * np.float32(self.info.scale)


def _widen(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bf16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def narrow_to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 bits as uint16, rounded to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
