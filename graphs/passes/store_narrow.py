"""Stores the weights of an fp32 graph in fp16 or bf16: half the file size, the same fp32 arithmetic.

Matches: every initializer named in `parameters`, which must be fp32.
Refuses: nothing else is touched; other initializers and all nodes stay as they are.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult


class StoreNarrow(InPlacePass):
    def __init__(self, parameters: set[str], storage: ir.DataType) -> None:
        super().__init__()
        self.parameters, self.storage = parameters, storage

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        casts = []
        for name in sorted(self.parameters & graph.initializers.keys()):
            stored = graph.initializers[name]
            cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT}, name=f"{name}.to_fp32")
            widened = cast.outputs[0]
            widened.name = f"{name}.fp32"
            widened.type = ir.TensorType(ir.DataType.FLOAT)
            stored.replace_all_uses_with(widened)
            cast.replace_input_with(0, stored)
            # A new type object, because graph clones share the types of values.
            stored.type = ir.TensorType(self.storage)
            casts.append(cast)
        if casts:
            graph.insert_before(graph[0], casts)
        return PassResult(model, modified=bool(casts))
