"""Where and how each weight is stored in a data file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from gemma3n_onnx.runtime.artifact import BYTES_PER_VALUE

from .quantization.config import PerRow, QuantizationConfig, Storage
from .writer import ALIGNMENT

_ROW_WORK = 6.0
_BLOCK_WORK = {"rtn": 5.0, "search": 22.0, "k-quant": 33.0, "hqq": 240.0}
"""Nanoseconds that it took to quantize and write a value, by method. Only their ratios matter, for the estimate of the
remaining time."""
_BYTE_WORK = 1.2
"""The same for a byte that is not quantized."""


@dataclass(frozen=True)
class StoredTensor:
    """`shape` values of `dtype`, row-major, at byte `offset` of `file`."""

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def work_per_value(self) -> float:
        return BYTES_PER_VALUE[self.dtype] * _BYTE_WORK

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES_PER_VALUE[self.dtype]

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    def first_rows(self, count: int) -> StoredTensor:
        return replace(self, shape=(count, *self.shape[1:]))


@dataclass(frozen=True)
class _QuantizedTensor:
    """A matrix [N, K] whose codes are stored first, and its scales, up to `end`, after them."""

    shape: tuple[int, ...]
    codes: StoredTensor
    scales: StoredTensor

    @property
    def file(self) -> str:
        return self.codes.file

    @property
    def offset(self) -> int:
        return self.codes.offset

    @property
    def end(self) -> int:
        return self.scales.end

    @property
    def nbytes(self) -> int:
        return self.end - self.offset


@dataclass(frozen=True)
class BlockQuantizedTensor(_QuantizedTensor):
    """A matrix [N, K] quantized as `config` says: codes [N, K / block, block * bits / 8] uint8, scales
    [N, K / block] fp16, and zero points if the method has them, one after another."""

    config: QuantizationConfig
    zeros: StoredTensor | None

    @classmethod
    def at(cls, file: str, offset: int, shape: tuple[int, ...], config: QuantizationConfig) -> BlockQuantizedTensor:
        rows, columns = shape
        groups, bits = columns // config.block, config.bits
        codes = StoredTensor(file, offset, "uint8", (rows, groups, config.block * bits // 8))
        scales = StoredTensor(file, codes.end, "fp16", (rows, groups))
        zeros = StoredTensor(file, scales.end, "uint8", (rows, -(-groups * bits // 8))) if config.has_zeros else None
        return cls(shape, codes, scales, config, zeros)

    @property
    def work_per_value(self) -> float:
        return _BLOCK_WORK[self.config.method]

    @property
    def parts(self) -> dict[str, StoredTensor]:
        parts = {"codes": self.codes, "scales": self.scales}
        return parts if self.zeros is None else parts | {"zeros": self.zeros}

    @property
    def end(self) -> int:
        return (self.zeros or self.scales).end

    def first_rows(self, count: int) -> BlockQuantizedTensor:
        return replace(
            self,
            shape=(count, *self.shape[1:]),
            codes=self.codes.first_rows(count),
            scales=self.scales.first_rows(count),
            zeros=None if self.zeros is None else self.zeros.first_rows(count),
        )


@dataclass(frozen=True)
class RowQuantizedTensor(_QuantizedTensor):
    """A matrix [N, K] quantized by rows: codes [K, N] int8, then scales [N] fp32."""

    @classmethod
    def at(cls, file: str, offset: int, shape: tuple[int, ...]) -> RowQuantizedTensor:
        rows, columns = shape
        codes = StoredTensor(file, offset, "int8", (columns, rows))
        aligned = -(-codes.end // 4) * 4
        return cls(shape, codes, StoredTensor(file, aligned, "fp32", (rows,)))

    @property
    def work_per_value(self) -> float:
        return _ROW_WORK


StoredTable = StoredTensor | BlockQuantizedTensor
StoredWeight = StoredTable | RowQuantizedTensor


def work_of(weights: Iterable[StoredWeight]) -> float:
    """The work of writing the weights."""
    return sum(math.prod(stored.shape) * stored.work_per_value for stored in weights)


def lay_out(
    file: str, shapes: Mapping[str, tuple[int, ...]], storage: Callable[[str], Storage]
) -> dict[str, StoredWeight]:
    """Lays tensors out one after another; a tensor of a page or more is page-aligned."""
    weights: dict[str, StoredWeight] = {}
    offset = 0
    for name, shape in shapes.items():
        stored = _stored_at(file, 0, shape, storage(name))
        alignment = ALIGNMENT if stored.nbytes >= ALIGNMENT else 64
        offset = -(-offset // alignment) * alignment
        weights[name] = _stored_at(file, offset, shape, storage(name))
        offset += stored.nbytes
    return weights


def _stored_at(file: str, offset: int, shape: tuple[int, ...], storage: Storage) -> StoredWeight:
    if isinstance(storage, QuantizationConfig):
        return BlockQuantizedTensor.at(file, offset, shape, storage)
    if isinstance(storage, PerRow):
        return RowQuantizedTensor.at(file, offset, shape)
    return StoredTensor(file, offset, storage, shape)
