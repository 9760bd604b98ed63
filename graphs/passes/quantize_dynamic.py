"""Computes products in int8: weights quantized by rows, activations as they come (DynamicQuantizeMatMul).

Matches: every initializer named in `weights`, as the second input of a Gemm with transB = 1 and no bias.
Refuses: any other use of it (AssertionError); `products` tells which have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class ChannelWeights:
    """A matrix [N, K]: `codes` [K, N] int8, `scales` [N] fp32."""

    codes: ir.TensorProtocol
    scales: ir.TensorProtocol


def products(model: ir.Model) -> set[str]:
    """The initializers that are nothing but weights of products x @ W.T."""
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
        present = {name: weights for name, weights in self.weights.items() if name in graph.initializers}
        for name, weights in present.items():
            whole = graph.initializers[name]
            parts = [_initializer(graph, tensor) for tensor in (weights.codes, weights.scales)]
            for node in [*whole.consumers()]:
                assert _is_product(node, whole), f"{name} is used by {node.op_type}, which takes no int8 weights"
                _replace(graph, node, parts)
            graph.initializers.pop(name)
        if present:
            model.opset_imports[_DOMAIN] = 1
        return PassResult(model, modified=bool(present))


def _is_product(node: ir.Node, weight: ir.Value) -> bool:
    attributes = {name: attribute.as_int() for name, attribute in node.attributes.items()} if _is_gemm(node) else {}
    return attributes == {"transB": 1} and len(node.inputs) == 2 and node.inputs[1] is weight


def _is_gemm(node: ir.Node) -> bool:
    return node.op_type == "Gemm" and not node.domain


def _replace(graph: ir.Graph, node: ir.Node, weights: list[ir.Value]) -> None:
    new = ir.node("DynamicQuantizeMatMul", [node.inputs[0], *weights], domain=_DOMAIN, version=1, name=node.name)
    old, made = node.outputs[0], new.outputs[0]
    made.name, made.dtype, made.shape = old.name, old.dtype, old.shape
    graph.insert_before(node, new)
    old.replace_all_uses_with(made, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=tensor.name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value
