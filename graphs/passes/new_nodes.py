"""Nodes and constants that passes add to a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


def add_before(
    graph: ir.Graph,
    place: ir.Node,
    operator: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    domain: str = "",
) -> ir.Value:
    """The output of a new node before `place`."""
    node = ir.node(operator, inputs, attributes or {}, domain=domain, version=1 if domain else None)
    graph.insert_before(place, node)
    return node.outputs[0]


def constant(graph: ir.Graph, prefix: str, name: str, content: Any) -> ir.Value:
    """The initializer `prefix.name`, int64 or fp32 as numpy takes `content`; made at the first call."""
    name = f"{prefix}.{name}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.asarray(content), name=name)
        shape, dtype = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        graph.register_initializer(ir.Value(name=name, shape=shape, type=dtype, const_value=tensor))
    return graph.initializers[name]
