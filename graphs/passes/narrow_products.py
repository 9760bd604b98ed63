"""Computes the matrix products of an fp32 graph in bf16 or fp16, and everything else in fp32.

Matches: every initializer that `quantize_dynamic.products` names.
Refuses: nothing else is touched.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from .quantize_dynamic import products


class NarrowProducts(InPlacePass):
    def __init__(self, dtype: ir.DataType) -> None:
        super().__init__()
        self.dtype = dtype

    def call(self, model: ir.Model) -> PassResult:
        weights = [model.graph.initializers[name] for name in sorted(products(model))]
        narrowed: dict[ir.Value, ir.Value] = {}
        for weight in weights:
            for node in weight.consumers():
                self._narrow(model.graph, node, narrowed)
            # A new type object, because graph clones share the types of values.
            weight.type = ir.TensorType(self.dtype)
        return PassResult(model, modified=bool(weights))

    def _narrow(self, graph: ir.Graph, node: ir.Node, narrowed: dict[ir.Value, ir.Value]) -> None:
        """`narrowed` maps an fp32 activation to its cast, which products of the same activation share."""
        x, out = node.inputs[0], node.outputs[0]
        assert x is not None
        if x not in narrowed:
            cast = ir.node("Cast", [x], {"to": self.dtype})
            cast.outputs[0].type = ir.TensorType(self.dtype)
            first = next(user for user in graph if x in user.inputs)
            graph.insert_before(first, cast)
            narrowed[x] = cast.outputs[0]
        node.replace_input_with(0, narrowed[x])
        widen = ir.node("Cast", [out], {"to": ir.DataType.FLOAT})
        wide = widen.outputs[0]
        out.replace_all_uses_with(wide, replace_graph_outputs=True)
        widen.replace_input_with(0, out)
        wide.name, wide.type, wide.shape = out.name, out.type, out.shape
        out.name = f"{out.name}.narrow"
        out.type = ir.TensorType(self.dtype)
        graph.insert_after(node, widen)
