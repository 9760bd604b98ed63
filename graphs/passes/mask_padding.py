"""Lets `attention_mask` have zeros anywhere, as in the left-padded batches of transformers' `generate`.

GroupQueryAttention takes rows by their lengths, with padding only on the right. Here every row is full, and an
attention bias hides its padding. The last position of a row is the last one that its mask shows. Windows count padding,
as those of transformers do.

Matches: a decoder with logits for the last position and without windowed caches. Every GroupQueryAttention gets a bias;
one that reads another's present, for the last position only, gets its causality and its window by it too.
Refuses: a graph with more than one GatherElements, which finds the last positions (ValueError).

Shape legend: B batch, S new tokens, T tokens of the mask.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from gemma3n_onnx.graphs.names import ATTENTION_MASK, POSITION_IDS

from .new_nodes import add_before, constant
from .split_donor_cache import ATTENTION, donor_of

_BIAS = 10  # its place among the operator's inputs
_WINDOW = "local_window_size"
# Added to a score. It is finite, because a padded position may see nothing but padding.
_HIDDEN = np.finfo(np.float32).min


class MaskPadding(InPlacePass):
    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        mask, positions = inputs[ATTENTION_MASK], inputs[POSITION_IDS]
        readers_of_mask = [*mask.consumers()]
        attentions = [node for node in graph if node.op_type == ATTENTION]
        (pick,) = (node for node in graph if node.op_type == "GatherElements")
        add, number = partial(add_before, graph, graph[0]), partial(constant, graph, "padding")

        zero, one = number("zero", [0]), number("one", [1])
        total, new = (add("Shape", [value], {"start": 1, "end": 2}) for value in (mask, positions))
        past = add("Sub", [total, new])
        padded = add("Equal", [mask, zero])  # [B, T]
        last = add("ArgMax", [add("Slice", [mask, past, total, one])], {"axis": 1, "select_last_index": 1})  # [B, 1]

        def bias_of(hidden: ir.Value) -> ir.Value:
            """[B, T] -> [B, 1, 1, T]"""
            bias = add("Where", [hidden, number("hidden", [_HIDDEN]), number("visible", [np.float32(0)])])
            return add("Unsqueeze", [bias, number("axes", [1, 2])])

        bias_of_all = add("Expand", [bias_of(padded), add("Concat", [one, one, new, one], {"axis": 0})])

        columns = add("Range", [number("first", 0), add("Squeeze", [total]), number("step", 1)])
        distances = add("Sub", [add("Add", [past, last]), columns])  # [B, T]
        hidden = add("Or", [padded, add("Less", [distances, zero])])
        bias_of_last = {-1: bias_of(hidden)}

        for node in attentions:
            node.resize_inputs(_BIAS + 1)
            if donor_of(node) is None:
                node.replace_input_with(_BIAS, bias_of_all)
                continue
            window = node.attributes[_WINDOW].as_int()
            if window not in bias_of_last:
                outside = add("GreaterOrEqual", [distances, number(f"window.{window}", [window])])
                bias_of_last[window] = bias_of(add("Or", [hidden, outside]))
            node.replace_input_with(_BIAS, bias_of_last[window])
            node.attributes.add(ir.AttrInt64(_WINDOW, -1))
        pick.replace_input_with(1, last)
        full = add("ConstantOfShape", [add("Shape", [mask])], {"value": ir.tensor([1], dtype=ir.DataType.INT64)})
        for node in readers_of_mask:
            node.replace_input_with(node.inputs.index(mask), full)
        RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=True)
