"""Predicts ONNX Runtime's node placement on CUDA without a GPU.

`cuda_kernels.txt` lists the CUDA kernels of onnxruntime-gpu 1.31 that the graphs of this project use, recorded from
that library's own placement (`ci/cuda_dry_run`). A node whose inputs are all on the host computes shapes and stays
there. Any other value that crosses between host and device is a blocking copy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import resources
from itertools import groupby

import onnx_ir as ir

# Inputs that CUDA kernels read from host memory.
_HOST_INPUTS = {
    "ConstantOfShape": {0},
    "Expand": {1},
    "GroupQueryAttention": {6},
    "Pad": {1, 3},
    "Range": {0, 1, 2},
    "ReduceMax": {1},
    "ReduceMean": {1},
    "ReduceSum": {1},
    "Reshape": {1},
    "Resize": {1, 2, 3},
    "Slice": {1, 2, 3, 4},
    "Split": {1},
    "Squeeze": {1},
    "Tile": {1},
    "TopK": {1},
    "Unsqueeze": {1},
}
_HOST_OUTPUTS = {"Shape", "Size"}


def complaints(model: ir.Model) -> list[str]:
    """Nodes without a CUDA kernel, and values copied between host and device: both interrupt a decode step."""
    found, on_host, dtypes = [], _on_host(model), dtypes_of(model)
    known = kernels()
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            if value is None or value.is_initializer() or _constant(value):
                continue
            reads_on_host = node in on_host or index in _HOST_INPUTS.get(node.op_type, ())
            made_on_host = (producer := value.producer()) is not None and _gives_on_host(producer, on_host)
            if reads_on_host and not made_on_host and node.op_type not in _HOST_OUTPUTS:
                found.append(f"{node.op_type} {node.name} reads {value.name} on the host, which the device makes")
            if made_on_host and not reads_on_host:
                found.append(f"{node.op_type} {node.name} reads {value.name} on the device, which the host makes")
        if node not in on_host and node.op_type != "Constant" and (kind := signature(node, dtypes)) not in known:
            found.append(f"{node.name} has no kernel for the device: {kind}")
    return found


def signature(node: ir.Node, dtypes: dict[ir.Value, ir.DataType | None]) -> str:
    """The operator with its input and output dtypes, runs of the same dtype written once: a line of the table."""

    def names(values: Sequence[ir.Value | None]) -> str:
        return " ".join(name for name, _ in groupby("-" if value is None else str(dtypes[value]) for value in values))

    return f"{node.domain or 'ai.onnx'} {node.op_type} {names(node.inputs)} > {names(node.outputs)}"


@functools.cache
def kernels() -> frozenset[str]:
    lines = resources.files(__package__).joinpath("cuda_kernels.txt").read_text(encoding="utf-8").splitlines()
    return frozenset(line for line in lines if not line.startswith("#"))


def dtypes_of(model: ir.Model) -> dict[ir.Value, ir.DataType | None]:
    """Dtypes of all values; a node output without a type has that of the node's first input."""
    graph = model.graph
    found = {value: value.dtype for value in (*graph.inputs, *graph.initializers.values())}
    for node in graph:
        for value in node.outputs:
            first = node.inputs[0] if node.inputs else None
            found[value] = value.dtype if value.dtype is not None or first is None else found[first]
    return found


def _constant(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "Constant"


def _gives_on_host(node: ir.Node, on_host: set[ir.Node]) -> bool:
    return node.op_type in _HOST_OUTPUTS or node in on_host


def _on_host(model: ir.Model) -> set[ir.Node]:
    """Nodes that compute shapes only."""
    found: set[ir.Node] = set()
    for node in model.graph:
        read_there = _HOST_INPUTS.get(node.op_type, set())
        data = [
            value
            for index, value in enumerate(node.inputs)
            if value is not None and index not in read_there and not value.is_initializer() and not _constant(value)
        ]
        producers = [value.producer() for value in data]
        if data and all(producer is not None and _gives_on_host(producer, found) for producer in producers):
            found.add(node)
    return found
