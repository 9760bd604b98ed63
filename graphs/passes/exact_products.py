"""Removes the rounding of activations to int8 or bf16 from matrix products; only the weights stay rounded.

The graph then computes what transformers computes on the dequantized weights, so the two can be compared.

Matches: every MatMulNBits, every DynamicQuantizeMatMul, and every bf16 Gemm between casts (`narrow_products`). The
weights of the latter two are widened to fp32 at load.
Refuses: a DynamicQuantizeMatMul with zero points or a bias (ValueError; `quantize_dynamic` makes none).
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

_UNQUANTIZED = 0  # `accuracy_level`: activations keep their dtype


class ExactProducts(InPlacePass):
    def call(self, model: ir.Model) -> PassResult:
        found = [node for node in model.graph if node.op_type in _EXACT]
        for node in found:
            _EXACT[node.op_type](model.graph, node)
        return PassResult(model, modified=bool(found))


def _in_blocks(graph: ir.Graph, node: ir.Node) -> None:
    node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _UNQUANTIZED)


def _in_rows(graph: ir.Graph, node: ir.Node) -> None:
    rows, codes, scales = node.inputs
    wide = ir.node("Cast", [codes], {"to": ir.DataType.FLOAT})
    weights = ir.node("Mul", [wide.outputs[0], scales])
    product = ir.node("MatMul", [rows, weights.outputs[0]], name=node.name)
    graph.insert_before(node, [wide, weights, product])
    _put(graph, product.outputs[0], in_place_of=node)


def _in_bf16(graph: ir.Graph, node: ir.Node) -> None:
    x, weight = node.inputs[:2]
    assert x is not None and weight is not None
    if weight.dtype != ir.DataType.BFLOAT16:
        return
    narrow = x.producer()
    assert narrow is not None
    (widen,) = node.outputs[0].consumers()
    wide = ir.node("Cast", [weight], {"to": ir.DataType.FLOAT})
    product = ir.node("Gemm", [narrow.inputs[0], wide.outputs[0]], {"transB": 1}, name=node.name)
    graph.insert_before(node, [wide, product])
    _put(graph, product.outputs[0], in_place_of=widen)
    graph.remove(node, safe=True)
    if not x.consumers():
        graph.remove(narrow, safe=True)


def _put(graph: ir.Graph, made: ir.Value, in_place_of: ir.Node) -> None:
    old = in_place_of.outputs[0]
    made.name, made.type, made.shape = old.name, old.type, old.shape
    old.replace_all_uses_with(made, replace_graph_outputs=True)
    graph.remove(in_place_of, safe=True)


_EXACT = {"MatMulNBits": _in_blocks, "DynamicQuantizeMatMul": _in_rows, "Gemm": _in_bf16}
