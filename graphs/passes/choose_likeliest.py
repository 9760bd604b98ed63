"""Adds an argmax to a decoder: a greedy step then copies 12 bytes to the host instead of all logits.

Matches: a decoder with logits [B, 1, V] for one position. Adds the outputs `next_token` [B, 1, 1] int64 and
`next_logit` [B, 1, 1], the largest logit. Ties go to the lowest id.
Refuses: nothing; the other outputs stay as they are.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from gemma3n_onnx.graphs.names import LOGITS, NEXT_LOGIT, NEXT_TOKEN


class ChooseLikeliest(InPlacePass):
    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        (logits,) = (value for value in graph.outputs if value.name == LOGITS)
        assert logits.shape is not None
        chosen = ir.node("ArgMax", [logits], {"axis": 2, "keepdims": 1}, name="choose")
        largest = ir.node("GatherElements", [logits, chosen.outputs[0]], {"axis": 2}, name="largest")
        for node, name, dtype in ((chosen, NEXT_TOKEN, ir.DataType.INT64), (largest, NEXT_LOGIT, logits.dtype)):
            assert dtype is not None
            output = node.outputs[0]
            output.name, output.type, output.shape = name, ir.TensorType(dtype), ir.Shape([*logits.shape[:2], 1])
            graph.append(node)
            graph.outputs.append(output)
        return PassResult(model, modified=True)
