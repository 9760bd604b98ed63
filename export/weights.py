"""Streams tensors from the checkpoint to external data files: reads, cuts, casts and writes blocks of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from gemma3n_onnx.graphs.passes.quantize_blocks import BlockWeights, QuantizeBlocks
from gemma3n_onnx.graphs.passes.quantize_dynamic import ChannelWeights, QuantizeDynamic
from gemma3n_onnx.graphs.passes.store_narrow import StoreNarrow
from gemma3n_onnx.runtime.artifact import FileInfo
from gemma3n_onnx.runtime.errors import shown

from . import slicing
from .checkpoint.checkpoint import Checkpoint
from .errors import CheckpointError, ExportError
from .quantization.config import PerRow, QuantizationConfig, Storage
from .quantization.quantize import dequantize, quantize, quantize_rows
from .quantization.threads import one_thread_an_operation
from .slicing import Slice, TensorCut
from .stored import BlockQuantizedTensor, RowQuantizedTensor, StoredTensor, StoredWeight
from .trace import DTYPES
from .writer import HashedFile

BLOCK_BYTES = 32 << 20

IR_DTYPES = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "uint8": ir.DataType.UINT8,
    "int8": ir.DataType.INT8,
}


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
            f"Tensor {name} has shape {shown([*found])} instead of the {[*wanted]} that config.json requires; "
            "give the config.json that was saved with it, or download the checkpoint again."
        )


Blocks = Iterator[np.ndarray]


@dataclass
class WeightStream:
    """Writes data files from blocks of tensors; calls `progress` with the work that is done, see `work_of`."""

    folder: Path
    progress: Callable[[float], None]

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
                counted = self._counted(blocks(tensor), stored.work_per_value)
                if isinstance(stored, BlockQuantizedTensor):
                    self._write_quantized(file, tensor, stored, counted, scale)
                elif isinstance(stored, RowQuantizedTensor):
                    self._write_rows(file, tensor, stored, counted, scale)
                else:
                    for block in counted:
                        _write(file, _cast(tensor, block, stored.dtype, scale))
                assert file.size == stored.end
        return file.info()

    def _counted(self, blocks: Blocks, work_per_value: float) -> Blocks:
        """The blocks; reports each once it has been written."""
        for block in blocks:
            yield block
            self.progress(block.size * work_per_value)

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
            _write(file, made.codes.numpy())
            rows = slice(done, done := done + len(block))
            scales[rows] = made.scales
            if zeros is not None and made.zeros is not None:
                zeros[rows] = made.zeros
        _write(file, scales)
        if zeros is not None:
            _write(file, zeros)

    def _write_rows(
        self, file: HashedFile, name: str, stored: RowQuantizedTensor, blocks: Blocks, scale: float
    ) -> None:
        """The codes are stored transposed, so the whole matrix must be in memory."""
        rows = [_cast(name, block, "fp32", scale) for block in blocks]
        codes, scales = quantize_rows(torch.from_numpy(np.concatenate(rows).reshape(stored.shape)))
        _write(file, codes.numpy())
        file.pad_to(stored.scales.offset)
        _write(file, scales.numpy())


def _write(file: HashedFile, data: np.ndarray) -> None:
    file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)


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
