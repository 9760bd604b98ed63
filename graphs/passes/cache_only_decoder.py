"""Prunes a decoder to the nodes that fill its KV caches, which is all that prefill needs before the last prompt token.

Matches: a decoder with logits for the last position. Removes the layers above the last KV producer, and all of that
layer but its attention.
Refuses: nothing; inputs and the other outputs stay as they are.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from gemma3n_onnx.graphs.names import LOGITS


class CacheOnlyDecoder(InPlacePass):
    def call(self, model: ir.Model) -> PassResult:
        outputs = model.graph.outputs
        (logits,) = (value for value in outputs if value.name == LOGITS)
        outputs.remove(logits)
        RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=True)
