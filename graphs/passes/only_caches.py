"""Cuts a decoder down to what fills its KV caches, which is all that a prompt needs of its tokens but the last.

Matches: a decoder with the short tail, whose logits are of one position. The layers above the last that produces K and
V go, and of that one all but its attention.
Refuses: nothing; inputs and the other outputs stay as they are.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from gemma3n_onnx.graphs.names import LOGITS


class OnlyCaches(InPlacePass):
    def call(self, model: ir.Model) -> PassResult:
        outputs = model.graph.outputs
        (logits,) = (value for value in outputs if value.name == LOGITS)
        outputs.remove(logits)
        RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=True)
