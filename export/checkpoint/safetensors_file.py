"""A safetensors file: the header is checked on opening, tensors are memory-mapped on reading."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma3n_onnx.export.errors import CheckpointError

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
ITEM_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64"), 64),
}
LENGTH_BYTES = 8


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as the file declares it; `dtype` is the safetensors name, such as "BF16"."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Entry:
    spec: TensorSpec
    offset: int  # bytes from the start of the file


class SafetensorsFile:
    """A safetensors file whose header matches its size. Holds no file handle and no mapping between reads."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            CheckpointError: the file is truncated, too long, or its header is damaged.
        """
        self.path = path
        self._entries = _read_header(path)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def spec(self, name: str) -> TensorSpec:
        return self._entries[name].spec

    def read(self, name: str) -> np.ndarray:
        """The whole tensor as a read-only memory map, which is unmapped with the array.

        Raises:
            CheckpointError: the dtype is not BF16, F16 or F32.
        """
        entry = self._entries[name]
        return self._map(name, entry.spec.shape, entry.offset)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of the first axis, read-only; only these are mapped.

        Raises:
            CheckpointError: the dtype is not BF16, F16 or F32.
            IndexError: the tensor is a scalar, or the rows are out of range.
        """
        entry = self._entries[name]
        shape = entry.spec.shape
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise IndexError(f"Rows {start} to {stop} are not within {name} of shape {shape}.")
        row_bytes = math.prod(shape[1:]) * ITEM_BITS[entry.spec.dtype] // 8
        return self._map(name, (stop - start, *shape[1:]), entry.offset + start * row_bytes)

    def _map(self, name: str, shape: tuple[int, ...], offset: int) -> np.ndarray:
        dtype_name = self._entries[name].spec.dtype
        dtype = NUMPY_DTYPES.get(dtype_name)
        if dtype is None:
            raise CheckpointError(
                f"{name} in {self.path} is of dtype {dtype_name}; "
                f"use a checkpoint in {', '.join(NUMPY_DTYPES)} (quantized checkpoints are not read)."
            )
        if math.prod(shape) == 0:
            return np.empty(shape, dtype)
        return np.memmap(self.path, dtype, mode="r", offset=offset, shape=shape).view(np.ndarray)


def _read_header(path: Path) -> dict[str, _Entry]:
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(LENGTH_BYTES)
        header_bytes = int.from_bytes(prefix, "little")
        data_offset = LENGTH_BYTES + header_bytes
        if len(prefix) < LENGTH_BYTES or data_offset > file_bytes:
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file: its header does not fit into "
                f"{file_bytes} bytes; download it again."
            )
        try:
            header = json.loads(file.read(header_bytes))
            header.pop("__metadata__", None)
            entries = {name: _entry(data_offset, **fields) for name, fields in header.items()}
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise CheckpointError(f"{path} has a damaged header ({error}); download it again.") from error
    needed = max((fields["data_offsets"][1] for fields in header.values()), default=0) + data_offset
    if needed != file_bytes:
        raise CheckpointError(
            f"{path} has {file_bytes} bytes, but its header describes {needed}: "
            f"the file is {'truncated' if file_bytes < needed else 'damaged'}; download it again."
        )
    return entries


def _entry(data_offset: int, dtype: str, shape: list[int], data_offsets: list[int]) -> _Entry:
    start, stop = data_offsets
    if dtype not in ITEM_BITS:
        raise ValueError(f"unknown dtype {dtype}")
    if not 0 <= start <= stop or (stop - start) * 8 != math.prod(shape) * ITEM_BITS[dtype]:
        raise ValueError(f"{dtype} of shape {shape} does not fill bytes {start} to {stop}")
    return _Entry(TensorSpec(dtype, tuple(shape)), data_offset + start)
