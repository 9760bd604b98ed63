"""Streams tensors from the checkpoint into data files: read rows, cut, cast, write. One block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from gemma3n_onnx.graphs.passes.store_narrow import StoreNarrow
from gemma3n_onnx.runtime.artifact import BYTES_PER_VALUE, FileInfo

from . import slicing
from .checkpoint import Checkpoint
from .errors import CheckpointError, ExportError
from .slicing import Slice, TensorCut
from .trace import DTYPES
from .writer import ALIGNMENT, HashedFile

BLOCK_BYTES = 32 << 20

IR_DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class Placement:
    """Where a tensor lies: `shape` values of `dtype`, row-major, at `offset` bytes of `file`."""

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * BYTES_PER_VALUE[self.dtype]


def lay_out(
    file: str, shapes: Mapping[str, tuple[int, ...]], dtype: str, *, aligned: bool = True
) -> dict[str, Placement]:
    """Puts tensors one after another; `aligned`, those of a page or more begin on a page."""
    placements, offset = {}, 0
    for name, shape in shapes.items():
        placement = Placement(file, 0, dtype, shape)
        alignment = _alignment(placement.nbytes) if aligned else 1
        offset = -(-offset // alignment) * alignment
        placements[name] = Placement(file, offset, dtype, shape)
        offset += placement.nbytes
    return placements


def weight_shapes(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Shape of each initializer of a traced graph that has no data yet, in the graph's order."""
    weights = {n: value for n, value in model.graph.initializers.items() if value.const_value is None}
    return {name: tuple(value.shape.numpy()) for name, value in weights.items() if value.shape is not None}


def attach(model: ir.Model, placements: Mapping[str, Placement]) -> None:
    """Points the graph's weights at their places, widening those that are stored narrower than they are used.

    A name without a place is a defect of the exporter.
    """
    initializers = model.graph.initializers
    narrow = {n for n in weight_shapes(model) if initializers[n].dtype != IR_DTYPES[placements[n].dtype]}
    for dtype in {placements[name].dtype for name in narrow}:
        StoreNarrow({n for n in narrow if placements[n].dtype == dtype}, IR_DTYPES[dtype])(model)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            place = placements[name]
            assert value.shape is not None
            if tuple(value.shape.numpy()) != place.shape:
                raise ExportError(f"The graph wants {name} as {value.shape}, the checkpoint gives {place.shape}.")
            value.const_value = ir.ExternalTensor(
                place.file,
                place.offset,
                place.nbytes,
                IR_DTYPES[place.dtype],
                shape=ir.Shape(place.shape),
                name=name,
                base_dir="",
            )


def check_tensors(checkpoint: Checkpoint, chosen: Slice, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Says before any work whether the checkpoint has what the slice needs, and nothing else.

    `shapes` are those that the config of the whole checkpoint asks for.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or belongs to no Gemma 3n decoder.
    """
    names = set(checkpoint.text_names())
    dropped = slicing.dropped({*names, *shapes}, chosen)
    if unused := names - shapes.keys() - dropped:
        raise CheckpointError(
            f"The checkpoint holds {min(unused)} and {len(unused) - 1} more tensors that a Gemma 3n decoder of its "
            "config.json does not have; give an unchanged checkpoint of Gemma 3n."
        )
    for name, wanted in shapes.items():
        if name not in dropped:
            check_shape(name, checkpoint.spec(name).shape, wanted)


def check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raises CheckpointError where a tensor's shape is not the one that follows from the config."""
    if found != wanted:
        raise CheckpointError(
            f"Tensor {name} has shape {list(found)} instead of the {list(wanted)} that config.json asks for; "
            "config and weights do not belong together, download the checkpoint again."
        )


Blocks = Iterator[np.ndarray]


@dataclass
class WeightStream:
    """Writes data files from blocks of tensors; `progress` is told the bytes written."""

    folder: Path
    progress: Callable[[int], None]

    def write_file(
        self,
        name: str,
        placements: Mapping[str, Placement],
        blocks: Callable[[str], Blocks],
        scale: float = 1.0,
    ) -> FileInfo:
        """Writes all tensors of one data file, `blocks(tensor)` multiplied by `scale` each.

        Raises:
            CheckpointError: a tensor holds NaN or infinity.
            ExportError: a value does not fit into the target dtype.
        """
        with HashedFile(self.folder / name) as file:
            for tensor, place in placements.items():
                file.pad_to(place.offset)
                for block in blocks(tensor):
                    data = _cast(tensor, block, place.dtype, scale)
                    file.write(data.reshape(-1).view(np.uint8).data)
                    self.progress(data.nbytes)
                assert file.size == place.offset + place.nbytes
        return file.info()


def raw_blocks(checkpoint: Checkpoint, raw_name: str) -> Blocks:
    """One tensor of the file, whole, a few rows at a time."""
    shape = checkpoint.raw_spec(raw_name).shape
    step = _rows_of_a_block(shape)
    for first in range(0, shape[0], step):
        yield checkpoint.raw_read_rows(raw_name, first, min(first + step, shape[0]))


def read_cut(checkpoint: Checkpoint, cut: TensorCut) -> torch.Tensor:
    """One tensor of a slice, whole, in the checkpoint's dtype."""
    return as_torch(np.concatenate(list(cut_blocks(checkpoint, cut))))


def cut_blocks(checkpoint: Checkpoint, cut: TensorCut) -> Blocks:
    """One tensor of a slice, a few rows at a time."""
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
    """The block in the storage dtype; bf16 comes back as uint16 bits."""
    source = as_torch(block)
    if scale != 1.0:
        source = source.float() * scale
    target = source.to(DTYPES[dtype])
    if not torch.isfinite(target).all():
        if not torch.isfinite(source).all():
            raise CheckpointError(f"Tensor {name} holds NaN or infinity; the checkpoint is damaged, download it again.")
        raise ExportError(f"Tensor {name} does not fit into {dtype}; choose --precision bf16 or fp32.")
    return target.view(torch.uint16).numpy() if dtype == "bf16" else target.numpy()


def rounded(values: torch.Tensor, dtype: str | None) -> torch.Tensor:
    """fp32 values as they are after being stored in `dtype`; as they were for None."""
    return values if dtype is None else values.to(DTYPES[dtype]).float()


def as_torch(values: np.ndarray) -> torch.Tensor:
    contiguous = np.array(values, order="C")  # a copy: what is read from a file is read-only
    if contiguous.dtype.name == "bfloat16":
        return torch.from_numpy(contiguous.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(contiguous)


def _alignment(nbytes: int) -> int:
    return ALIGNMENT if nbytes >= ALIGNMENT else 64
