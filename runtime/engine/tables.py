"""Reads rows of the embedding tables from disk; the tables take no process memory."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np

from gemma3n_onnx.runtime.artifact import QUANTIZED_BITS, TableInfo
from gemma3n_onnx.runtime.errors import ArtifactError

_STORED = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}


class EmbeddingTable:
    """A row-major table on disk. Rows are read, not mapped: a mapping costs resident memory in whole pages
    (with large folios in megabytes) around every row, and a truncated file would crash the process."""

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
            ArtifactError: the file is shorter than its manifest says.
        """
        info = self.info
        values = self._read(ids, 0, info.row_bytes)
        if info.block is not None and info.scales_offset is not None:
            scales = self._read(ids, info.scales_offset, info.scale_row_bytes).view(np.float16)
            rows = dequantize(values, scales, info.block, QUANTIZED_BITS[info.dtype])
            rows *= np.float32(info.scale)
            return to_compute_dtype(rows, self._compute)
        stored = values.view(_STORED[info.dtype])
        if self._compute == "fp16":
            return stored.astype(np.float16, copy=False) * np.float16(info.scale)
        return to_compute_dtype(_widen(stored, info.dtype) * np.float32(info.scale), self._compute)

    def _read(self, ids: np.ndarray, offset: int, row_bytes: int) -> np.ndarray:
        """uint8 [n, row_bytes], from the rows of that length that begin at `offset`."""
        read = np.empty((len(ids), row_bytes), dtype=np.uint8)
        for row, table_row in zip(read, ids.tolist()):
            self._read_into(row.data, offset + table_row * row_bytes)
        return read

    def _read_into(self, row: memoryview, offset: int) -> None:
        if hasattr(os, "preadv"):
            count = os.preadv(self._file.fileno(), [row], offset)
        else:
            with self._lock:
                self._file.seek(offset)
                count = self._file.readinto(row) or 0
        if count != len(row):
            raise ArtifactError(f"{self.info.file} is shorter than its manifest says; copy or export it again.")


def dequantize(codes: np.ndarray, scales: np.ndarray, block: int, bits: int) -> np.ndarray:
    """codes [n, width * bits / 8] uint8, scales [n, width / block] fp16 -> fp32 [n, width]."""
    if bits == 4:
        codes = np.stack((codes & 0xF, codes >> 4), axis=-1).reshape(len(codes), -1)
    centred = codes.astype(np.float32) - np.float32(1 << (bits - 1))
    return (centred.reshape(len(codes), -1, block) * scales.astype(np.float32)[:, :, None]).reshape(len(codes), -1)


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
