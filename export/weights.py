"""Streams tensors from the checkpoint to external data files: reads, cuts, casts and writes blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from gemma3n_onnx.graphs.passes.quantize_blocks import BlockWeights, QuantizeBlocks
from gemma3n_onnx.graphs.passes.quantize_dynamic import ChannelWeights, QuantizeDynamic
from gemma3n_onnx.graphs.passes.store_narrow import StoreNarrow
from gemma3n_onnx.runtime.artifact import BYTES_PER_VALUE, FileInfo

from . import slicing
from .checkpoint.checkpoint import Checkpoint
from .errors import CheckpointError, ExportError
from .quantization.config import PerRow, QuantizationConfig, Storage
from .quantization.quantize import dequantize, quantize, quantize_rows
from .quantization.threads import one_thread_an_operation
from .slicing import Slice, TensorCut
from .trace import DTYPES
from .writer import ALIGNMENT, HashedFile

BLOCK_BYTES = 32 << 20

IR_DTYPES = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "uint8": ir.DataType.UINT8,
    "int8": ir.DataType.INT8,
}


@dataclass(frozen=True)
class StoredTensor:
    """`shape` values of `dtype`, row-major, at byte `offset` of `file`."""

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES_PER_VALUE[self.dtype]

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    def first_rows(self, count: int) -> StoredTensor:
        return replace(self, shape=(count, *self.shape[1:]))


@dataclass(frozen=True)
class BlockQuantizedTensor:
    """A matrix [N, K] quantized as `config` says: codes [N, K / block, block * bits / 8] uint8, scales
    [N, K / block] fp16, and zero points if the method has them, one after another."""

    config: QuantizationConfig
    shape: tuple[int, ...]
    codes: StoredTensor
    scales: StoredTensor
    zeros: StoredTensor | None

    @classmethod
    def at(cls, file: str, offset: int, shape: tuple[int, ...], config: QuantizationConfig) -> BlockQuantizedTensor:
        rows, columns = shape
        groups, bits = columns // config.block, config.bits
        codes = StoredTensor(file, offset, "uint8", (rows, groups, config.block * bits // 8))
        scales = StoredTensor(file, codes.end, "fp16", (rows, groups))
        zeros = StoredTensor(file, scales.end, "uint8", (rows, -(-groups * bits // 8))) if config.has_zeros else None
        return cls(config, shape, codes, scales, zeros)

    @property
    def file(self) -> str:
        return self.codes.file

    @property
    def offset(self) -> int:
        return self.codes.offset

    @property
    def parts(self) -> dict[str, StoredTensor]:
        parts = {"codes": self.codes, "scales": self.scales}
        return parts if self.zeros is None else parts | {"zeros": self.zeros}

    @property
    def end(self) -> int:
        return (self.zeros or self.scales).end

    @property
    def nbytes(self) -> int:
        return self.end - self.offset

    def first_rows(self, count: int) -> BlockQuantizedTensor:
        codes, scales, zeros = (
            None if part is None else replace(part, shape=(count, *part.shape[1:]))
            for part in (self.codes, self.scales, self.zeros)
        )
        assert codes is not None and scales is not None
        return BlockQuantizedTensor(self.config, (count, *self.shape[1:]), codes, scales, zeros)


@dataclass(frozen=True)
class RowQuantizedTensor:
    """A matrix [N, K] quantized by rows: codes [K, N] int8, then scales [N] fp32."""

    shape: tuple[int, ...]
    codes: StoredTensor
    scales: StoredTensor

    @classmethod
    def at(cls, file: str, offset: int, shape: tuple[int, ...]) -> RowQuantizedTensor:
        rows, columns = shape
        codes = StoredTensor(file, offset, "int8", (columns, rows))
        aligned = -(-codes.end // 4) * 4
        return cls(shape, codes, StoredTensor(file, aligned, "fp32", (rows,)))

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


StoredTable = StoredTensor | BlockQuantizedTensor
StoredWeight = StoredTable | RowQuantizedTensor


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


def weight_shapes(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Shapes of the initializers of a traced graph that have no data yet, in graph order."""
    weights = {n: value for n, value in model.graph.initializers.items() if value.const_value is None}
    return {name: tuple(value.shape.numpy()) for name, value in weights.items() if value.shape is not None}


def attach(model: ir.Model, weights: Mapping[str, StoredWeight]) -> None:
    """Points the graph's initializers at the stored `weights`.

    Weights stored in a narrower dtype get a Cast; quantized weights get operators that read their format.

    Raises:
        KeyError: a weight is not stored (an exporter bug).
    """
    initializers = model.graph.initializers
    used = {name: weights[name] for name in weight_shapes(model)}
    for name, stored in used.items():
        shape = initializers[name].shape
        assert shape is not None
        if tuple(shape.numpy()) != stored.shape:
            raise ExportError(f"The graph needs {name} with shape {shape}, but the checkpoint has {stored.shape}.")
    quantized = {name: stored for name, stored in used.items() if isinstance(stored, BlockQuantizedTensor)}
    QuantizeBlocks({name: _block_weights(name, stored) for name, stored in quantized.items()})(model)
    by_rows = {name: stored for name, stored in used.items() if isinstance(stored, RowQuantizedTensor)}
    QuantizeDynamic({name: _channel_weights(name, stored) for name, stored in by_rows.items()})(model)
    plain = {name: stored for name, stored in used.items() if isinstance(stored, StoredTensor)}
    narrow = {name for name, stored in plain.items() if initializers[name].dtype != IR_DTYPES[stored.dtype]}
    for dtype in {plain[name].dtype for name in narrow}:
        StoreNarrow({name for name in narrow if plain[name].dtype == dtype}, IR_DTYPES[dtype])(model)
    for name, stored in plain.items():
        initializers[name].const_value = _external(name, stored)


def _block_weights(name: str, stored: BlockQuantizedTensor) -> BlockWeights:
    parts = {part: _external(f"{name}.{part}", at) for part, at in stored.parts.items()}
    config = stored.config
    return BlockWeights(config.bits, config.block, parts["codes"], parts["scales"], parts.get("zeros"))


def _channel_weights(name: str, stored: RowQuantizedTensor) -> ChannelWeights:
    return ChannelWeights(_external(f"{name}.codes", stored.codes), _external(f"{name}.scales", stored.scales))


def _external(name: str, stored: StoredTensor) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        stored.file,
        stored.offset,
        stored.nbytes,
        IR_DTYPES[stored.dtype],
        shape=ir.Shape(stored.shape),
        name=name,
        base_dir="",
    )


def check_tensors(checkpoint: Checkpoint, chosen: Slice, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that the checkpoint has exactly the tensors of its config that the slice needs.

    `shapes` follow from the config of the whole checkpoint.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is not part of a Gemma 3n decoder.
    """
    names = set(checkpoint.text_names())
    dropped = slicing.dropped({*names, *shapes}, chosen)
    if unused := names - shapes.keys() - dropped:
        raise CheckpointError(
            f"The checkpoint has {min(unused)} and {len(unused) - 1} more tensors that a Gemma 3n decoder of its "
            "config.json does not have; give an unchanged checkpoint of Gemma 3n."
        )
    for name, wanted in shapes.items():
        if name not in dropped:
            check_shape(name, checkpoint.spec(name).shape, wanted)


def check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raises CheckpointError if a tensor does not have the shape that follows from the config."""
    if found != wanted:
        raise CheckpointError(
            f"Tensor {name} has shape {list(found)} instead of the {list(wanted)} that config.json requires; "
            "give the config.json that was saved with it, or download the checkpoint again."
        )


Blocks = Iterator[np.ndarray]


@dataclass
class WeightStream:
    """Writes data files from blocks of tensors; calls `progress` with the bytes written."""

    folder: Path
    progress: Callable[[int], None]

    def write_file(
        self,
        name: str,
        weights: Mapping[str, StoredWeight],
        blocks: Callable[[str], Blocks],
        scale: float = 1.0,
    ) -> FileInfo:
        """Writes all tensors of one data file, each read from `blocks(tensor)` and multiplied by `scale`.

        Raises:
            CheckpointError: a tensor contains NaN or infinity.
            ExportError: a value does not fit into the target dtype.
        """
        with HashedFile(self.folder / name) as file, one_thread_an_operation():
            for tensor, stored in weights.items():
                file.pad_to(stored.offset)
                if isinstance(stored, BlockQuantizedTensor):
                    self._write_quantized(file, tensor, stored, blocks(tensor), scale)
                elif isinstance(stored, RowQuantizedTensor):
                    self._write_rows(file, tensor, stored, blocks(tensor), scale)
                else:
                    for block in blocks(tensor):
                        self._write(file, _cast(tensor, block, stored.dtype, scale))
                assert file.size == stored.end
        return file.info()

    def _write_quantized(
        self, file: HashedFile, name: str, stored: BlockQuantizedTensor, blocks: Blocks, scale: float
    ) -> None:
        # Preallocated, because small arrays that outlive the large blocks would fragment the heap.
        scales = np.empty(stored.scales.shape, np.float16)
        zeros = np.empty(stored.zeros.shape, np.uint8) if stored.zeros is not None else None
        done = 0
        for block in blocks:
            values = torch.from_numpy(_cast(name, block, "fp32", scale))
            made = quantize(values, stored.config)
            if not torch.isfinite(made.scales).all():
                raise ExportError(f"Tensor {name} has values too large to quantize; choose --precision bf16.")
            self._write(file, made.codes.numpy())
            rows = slice(done, done := done + len(block))
            scales[rows] = made.scales
            if zeros is not None and made.zeros is not None:
                zeros[rows] = made.zeros
        self._write(file, scales)
        if zeros is not None:
            self._write(file, zeros)

    def _write_rows(
        self, file: HashedFile, name: str, stored: RowQuantizedTensor, blocks: Blocks, scale: float
    ) -> None:
        """The codes are stored transposed, so the whole matrix must be in memory."""
        rows = [_cast(name, block, "fp32", scale) for block in blocks]
        codes, scales = quantize_rows(torch.from_numpy(np.concatenate(rows).reshape(stored.shape)))
        self._write(file, codes.numpy())
        file.pad_to(stored.scales.offset)
        self._write(file, scales.numpy())

    def _write(self, file: HashedFile, data: np.ndarray) -> None:
        file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
        self.progress(data.nbytes)


def raw_blocks(checkpoint: Checkpoint, raw_name: str) -> Blocks:
    """All rows of a tensor in the file, in blocks."""
    shape = checkpoint.raw_spec(raw_name).shape
    step = _rows_of_a_block(shape)
    for first in range(0, shape[0], step):
        yield checkpoint.raw_read_rows(raw_name, first, min(first + step, shape[0]))


def read_cut(checkpoint: Checkpoint, cut: TensorCut) -> torch.Tensor:
    """A whole tensor of a slice, in the checkpoint's dtype."""
    return as_torch(np.concatenate(list(cut_blocks(checkpoint, cut))))


def cut_blocks(checkpoint: Checkpoint, cut: TensorCut) -> Blocks:
    """The rows of a tensor of a slice, in blocks."""
    shape = checkpoint.spec(cut.source).shape
    step = _rows_of_a_block(shape)
    for start, stop in cut.rows or ((0, shape[0]),):
        for first in range(start, stop, step):
            block = checkpoint.read_rows(cut.source, first, min(first + step, stop))
            if cut.columns is not None:
                block = np.concatenate([block[:, a:b] for a, b in cut.columns], axis=1)
            yield block


def _rows_of_a_block(shape: tuple[int, ...]) -> int:
    return max(1, BLOCK_BYTES // (4 * int(np.prod(shape[1:]))))


def _cast(name: str, block: np.ndarray, dtype: str, scale: float) -> np.ndarray:
    """The block in the storage dtype; bf16 as its bits in uint16."""
    source = as_torch(block)
    if scale != 1.0:
        source = source.float() * scale
    target = source.to(DTYPES[dtype])
    if not _all_finite(target):
        if not _all_finite(source):
            raise CheckpointError(f"Tensor {name} contains NaN or infinity; download the checkpoint again.")
        raise ExportError(f"Tensor {name} does not fit into {dtype}; choose --precision bf16 or fp32.")
    return target.view(torch.uint16).numpy() if dtype == "bf16" else target.numpy()


def _all_finite(values: torch.Tensor) -> bool:
    """NaN and infinity propagate to the extremes; `aminmax` takes a tenth of the time of `isfinite`."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def as_stored(values: torch.Tensor, storage: Storage) -> torch.Tensor:
    """The fp32 `values` after a round trip through `storage`: rounded, or quantized and dequantized."""
    if isinstance(storage, PerRow):
        codes, scales = quantize_rows(values.flatten(1))
        return (codes.T * scales[:, None]).view_as(values)
    if isinstance(storage, QuantizationConfig):
        some = values.split(_rows_of_a_block(tuple(values.shape)))
        return torch.cat([dequantize(quantize(rows, storage), storage) for rows in some])
    return values.to(DTYPES[storage]).float()


def as_torch(values: np.ndarray) -> torch.Tensor:
    contiguous = np.array(values, order="C")  # a copy, because memory-mapped arrays are read-only
    if contiguous.dtype.name == "bfloat16":
        return torch.from_numpy(contiguous.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(contiguous)
