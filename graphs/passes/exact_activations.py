"""Has quantized products take their activations as they are, so that nothing but the weights is rounded.

What transformers computes on the dequantized weights, this computes too: for comparing the two.

Matches: every MatMulNBits, and every DynamicQuantizeMatMul, whose weights are then widened when the graph is loaded.
Refuses: a DynamicQuantizeMatMul with zero points or a bias (AssertionError; `quantize_dynamic` makes none).
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

_AS_THEY_COME = 0  # `accuracy_level`: activations keep their type


class ExactActivations(InPlacePass):
    def call(self, model: ir.Model) -> PassResult:
        found = [node for node in model.graph if node.op_type in _EXACT]
        for node in found:
            _EXACT[node.op_type](model.graph, node)
        return PassResult(model, modified=bool(found))


def _in_blocks(graph: ir.Graph, node: ir.Node) -> None:
    node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _AS_THEY_COME)


def _in_rows(graph: ir.Graph, node: ir.Node) -> None:
    rows, codes, scales = node.inputs
    wide = ir.node("Cast", [codes], {"to": ir.DataType.FLOAT})
    weights = ir.node("Mul", [wide.outputs[0], scales])
    product = ir.node("MatMul", [rows, weights.outputs[0]], name=node.name)
    old, made = node.outputs[0], product.outputs[0]
    made.name, made.type, made.shape = old.name, old.type, old.shape
    graph.insert_before(node, [wide, weights, product])
    old.replace_all_uses_with(made, replace_graph_outputs=True)
    graph.remove(node, safe=True)


_EXACT = {"MatMulNBits": _in_blocks, "DynamicQuantizeMatMul": _in_rows}
