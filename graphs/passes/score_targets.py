"""Turns a decoder into a scorer: log-probabilities of target tokens instead of logits.

Scores the last N of S new positions in each row; the layers above the last KV producer run for these only. Rows have no
padding, and every KV cache keeps all positions, so that any prefix can be reused.

Matches: a decoder with logits [B, 1, V] for the last position, which one GatherElements finds. Adds the input `targets`
[B, N] int64, the tokens that follow the last N positions. The outputs `target_logprobs` [B, N], `top_logprobs`
[B, N, K], descending, and `top_ids` [B, N, K] int64 take the place of the logits: natural logarithms of
softmax(logits), fp32, with K = min(`TOP`, V).
Refuses: a graph with more than one GatherElements (ValueError).

Shape legend: B batch, S new tokens, N scored tokens, V vocabulary, n = B * N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from gemma3n_onnx.graphs import names

from .new_nodes import constant
from .split_donor_cache import ATTENTION, donor_of

TOP = 20
"""The most likely tokens that are listed at each position."""
_END = (1 << 63) - 1
_LENGTHS = (5, 6)  # of the cache, among the inputs of an attention


class ScoreTargets(InPlacePass):
    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        (pick,) = (node for node in graph if node.op_type == "GatherElements")
        targets = _new_input(graph)
        add, number = partial(_add, graph), partial(constant, graph, "score")

        scored = add("Shape", [targets], {"start": 1, "end": 2}, before=pick)
        first = add("Neg", [scored], before=pick)
        last = add("Slice", [pick.inputs[0], first, number("end", [_END]), number("columns", [1])], before=pick)
        ir.convenience.replace_all_uses_with(pick.outputs[0], last)

        _keep_all_positions(graph)

        (logits,) = (value for value in graph.outputs if value.name == names.LOGITS)
        unsqueeze = logits.producer()
        assert unsqueeze is not None and unsqueeze.op_type == "Unsqueeze" and logits.shape is not None
        (flat, *_), width = unsqueeze.inputs, logits.shape[2]  # flat: [n, V]
        assert isinstance(width, int)
        graph.outputs.remove(logits)
        count, axis, shape = min(TOP, width), number("vocabulary", [1]), add("Shape", [targets])
        top, ids = add("TopK", [flat, number("top", [count])], {"axis": 1}, outputs=2)
        largest = add("ReduceMax", [flat, axis])
        weights = add("Exp", [add("Sub", [flat, largest])])
        log_total = add("Add", [largest, add("Log", [add("ReduceSum", [weights, axis])])])
        chosen = add("GatherElements", [flat, add("Reshape", [targets, number("column", [-1, 1])])], {"axis": 1})
        listed = add("Concat", [shape, number("width", [count])], {"axis": 0})
        found: tuple[tuple[str, ir.Value, ir.DataType, list[int]], ...] = (
            (names.TARGET_LOGPROBS, add("Reshape", [add("Sub", [chosen, log_total]), shape]), ir.DataType.FLOAT, []),
            (names.TOP_LOGPROBS, add("Reshape", [add("Sub", [top, log_total]), listed]), ir.DataType.FLOAT, [count]),
            (names.TOP_IDS, add("Reshape", [ids, listed]), ir.DataType.INT64, [count]),
        )
        for place, (name, value, dtype, more) in enumerate(found):
            value.name, value.type = name, ir.TensorType(dtype)
            value.shape = ir.Shape([names.BATCH, names.SCORED_TOKENS, *more])
            graph.outputs.insert(place, value)
        RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=True)


def _new_input(graph: ir.Graph) -> ir.Value:
    shape = ir.Shape([names.BATCH, names.SCORED_TOKENS])
    targets = ir.Value(name=names.TARGETS, type=ir.TensorType(ir.DataType.INT64), shape=shape)
    place = next(i for i, value in enumerate(graph.inputs) if value.name == names.POSITION_IDS)
    graph.inputs.insert(place + 1, targets)
    return targets


def _keep_all_positions(graph: ir.Graph) -> None:
    """Makes the caches of sliding layers as long as the others."""
    attentions = [node for node in graph if node.op_type == ATTENTION]
    producer = next(node for node in attentions if donor_of(node) is None)
    for node in attentions:
        node.attributes.pop("sliding_window_cache", None)
        if donor_of(node) is not None:
            for place in _LENGTHS:
                node.replace_input_with(place, producer.inputs[place])
    for value in (*graph.inputs, *graph.outputs):
        assert value.shape is not None
        sizes = (names.CAPACITY if str(size) == names.WINDOW_CAPACITY else size for size in value.shape)
        value.shape = ir.Shape([size.value if isinstance(size, ir.SymbolicDim) else size for size in sizes])


def _add(
    graph: ir.Graph,
    operator: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    before: ir.Node | None = None,
    outputs: int = 1,
) -> Any:
    """The output of a new node at the end of the graph, or `before` another; a list if there are several outputs."""
    node = ir.node(operator, inputs, attributes or {}, num_outputs=outputs)
    if before is None:
        graph.append(node)
    else:
        graph.insert_before(before, node)
    for place, value in enumerate(node.outputs):
        value.name = f"score.{len(graph)}.{place}"
    return node.outputs[0] if outputs == 1 else node.outputs
