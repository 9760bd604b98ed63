"""Computes matrix products in int8 (DynamicQuantizeMatMul), with one scale for each row of weights and activations.

The operator has a single scale for all activations. Each row is therefore divided by its largest magnitude first, and
the product is multiplied by it, so that rows of small values keep all eight bits.

Matches: every initializer named in `weights`, as the second input of a Gemm with transB = 1 and no bias.
Refuses: any other use of it (AssertionError); `products` lists the initializers without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from .new_nodes import add_before

_DOMAIN = "com.microsoft"
_LEAST = 1e-30


@dataclass(frozen=True)
class ChannelWeights:
    """A matrix [N, K]: `codes` [K, N] int8, `scales` [N] fp32."""

    codes: ir.TensorProtocol
    scales: ir.TensorProtocol


def products(model: ir.Model) -> set[str]:
    """The initializers that are used only as the weight of products x @ W.T."""
    return {
        name
        for name, value in model.graph.initializers.items()
        if value.consumers() and all(_is_product(node, value) for node in value.consumers())
    }


class QuantizeDynamic(InPlacePass):
    def __init__(self, weights: Mapping[str, ChannelWeights]) -> None:
        super().__init__()
        self.weights = weights

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        present = {name: graph.initializers[name] for name in self.weights if name in graph.initializers}
        for name, whole in present.items():
            for node in whole.consumers():
                assert _is_product(node, whole), f"{name} is used by {node.op_type}, which cannot read int8 weights"
        scaled: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        for node in [*graph]:
            if _is_gemm(node) and (weight := node.inputs[1]) in present.values():
                assert weight is not None and weight.name is not None
                _replace(graph, node, self.weights[weight.name], scaled)
        for name in present:
            graph.initializers.pop(name)
        if present:
            model.opset_imports[_DOMAIN] = 1
        return PassResult(model, modified=bool(present))


def _replace(
    graph: ir.Graph, node: ir.Node, weights: ChannelWeights, scaled: dict[ir.Value, tuple[ir.Value, ir.Value]]
) -> None:
    """`scaled` maps an activation to its scaled rows and their magnitudes, which products of it share."""
    x, out = node.inputs[0], node.outputs[0]
    assert x is not None
    if x not in scaled:
        scaled[x] = _scaled_rows(graph, node, x)
    rows, magnitudes = scaled[x]
    parts = [_initializer(graph, tensor) for tensor in (weights.codes, weights.scales)]
    product = add_before(graph, node, "DynamicQuantizeMatMul", [rows, *parts], domain=_DOMAIN)
    made = add_before(graph, node, "Mul", [product, magnitudes])
    made.name, made.type, made.shape = out.name, out.type, out.shape
    out.replace_all_uses_with(made, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _scaled_rows(graph: ir.Graph, before: ir.Node, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """x [T, K] -> rows divided by their largest magnitude [T, K], and these magnitudes [T, 1]."""
    last = _initializer(graph, ir.tensor([-1], name="rows.axis"))
    least = _initializer(graph, ir.tensor([_LEAST], dtype=ir.DataType.FLOAT, name="rows.least"))
    largest = add_before(graph, before, "ReduceMax", [add_before(graph, before, "Abs", [x]), last], {"keepdims": 1})
    magnitudes = add_before(graph, before, "Max", [largest, least])
    return add_before(graph, before, "Div", [x, magnitudes]), magnitudes


def _is_product(node: ir.Node, weight: ir.Value) -> bool:
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    return _is_gemm(node) and attributes == {"transB": 1} and len(node.inputs) == 2 and node.inputs[1] is weight


def _is_gemm(node: ir.Node) -> bool:
    return node.op_type == "Gemm" and not node.domain


def _initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """The graph's initializer with the tensor's name, registered at the first call."""
    assert tensor.name is not None
    if tensor.name not in graph.initializers:
        dtype = ir.TensorType(tensor.dtype)
        value = ir.Value(name=tensor.name, shape=ir.Shape(tensor.shape.numpy()), type=dtype, const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[tensor.name]
