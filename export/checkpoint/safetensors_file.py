"""A safetensors file: the header is checked on opening, tensors are memory-mapped on reading.

Source of the rules: the format's description in the safetensors repository (README.md, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma3n_onnx.export.errors import CheckpointError
from gemma3n_onnx.runtime.errors import shown

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
MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library
_METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as the file declares it; `dtype` is the safetensors name, such as "BF16"."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Entry:
    """`start` and `stop` are bytes of the file."""

    spec: TensorSpec
    start: int
    stop: int


class SafetensorsFile:
    """A safetensors file whose header matches its size. Holds no file handle and no mapping between reads."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            CheckpointError: the file is truncated or too long, its header is damaged, or its tensors overlap or leave
                bytes out.
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
        return self._map(name, entry.spec.shape, entry.start)

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
        return self._map(name, (stop - start, *shape[1:]), entry.start + start * row_bytes)

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
            if header_bytes > MAX_HEADER_BYTES:
                raise ValueError(f"it has {header_bytes:,} bytes, more than {MAX_HEADER_BYTES:,}")
            header = json.loads(file.read(header_bytes).decode("utf-8"), object_pairs_hook=_unique)
            if not isinstance(header, dict):
                raise ValueError("it is not an object")
            header.pop(_METADATA, None)
            entries = {name: _entry(name, data_offset, fields) for name, fields in header.items()}
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} has a damaged header ({error}); download it again.") from error
    _check_layout(path, entries, data_offset, file_bytes)
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} comes twice")
        found[name] = value
    return found


def _entry(name: str, data_offset: int, fields: Mapping[str, Any]) -> _Entry:
    """Raises ValueError for anything but a tensor that fills its bytes."""
    if not isinstance(fields, Mapping) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise ValueError(f"{shown(name)} has the unknown dtype {shown(dtype)}")
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or not all(type(number) is int and number >= 0 for number in value):
            raise ValueError(f"{shown(name)} has the {key} {shown(value)}, not a list of whole numbers")
    if len(offsets) != 2 or (offsets[1] - offsets[0]) * 8 != math.prod(shape) * ITEM_BITS[dtype]:
        raise ValueError(f"{shown(name)}, {dtype} of shape {shown(shape)}, does not fill the bytes {shown(offsets)}")
    start, stop = offsets
    return _Entry(TensorSpec(dtype, tuple(shape)), data_offset + start, data_offset + stop)


def _check_layout(path: Path, entries: Mapping[str, _Entry], data_offset: int, file_bytes: int) -> None:
    """Raises CheckpointError unless the tensors, in the order of their bytes, fill the file without overlap."""
    end, before = data_offset, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            what = "overlap" if entry.start < end else f"have {entry.start - end:,} bytes of no tensor between them"
            raise CheckpointError(f"In {path}, {before} and {shown(name)} {what}; download it again.")
        end, before = entry.stop, shown(name)
    if end != file_bytes:
        raise CheckpointError(
            f"{path} has {file_bytes} bytes, but its header describes {end}: "
            f"the file is {'truncated' if file_bytes < end else 'damaged'}; download it again."
        )
