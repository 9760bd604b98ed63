"""Splits the cache that a KV-shared layer reads into a past without the last token and a new key and value.

Before ONNX Runtime 1.31, GroupQueryAttention requires at least one new key, but all keys of a KV-shared layer are in
the donor's cache. The split copies the donors' caches at every step.

Matches: every GroupQueryAttention whose past is the present of another one, with a query of one position.
Refuses: nothing; other nodes stay as they are.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from .new_nodes import constant

ATTENTION = "GroupQueryAttention"
_END = (1 << 63) - 1


class SplitDonorCache(InPlacePass):
    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        split: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        readers = [node for node in graph if node.op_type == ATTENTION and donor_of(node) is not None]
        for node in readers:
            for new, past in ((1, 3), (2, 4)):
                cache = node.inputs[past]
                assert cache is not None
                if cache not in split:
                    split[cache] = _split(graph, node, cache)
                earlier, last = split[cache]
                node.replace_input_with(past, earlier)
                node.replace_input_with(new, last)
            # With its own present, the operator does not write the new key past the end of its past.
            node.resize_outputs(3)
            for value, part in zip(node.outputs[1:], ("key", "value")):
                value.name = f"{node.name}.{part}"
        return PassResult(model, modified=bool(readers))


def donor_of(attention: ir.Node) -> ir.Node | None:
    """The GroupQueryAttention whose present is the past of another one."""
    past = attention.inputs[3]
    producer = None if past is None else past.producer()
    return producer if producer is not None and producer.op_type == ATTENTION else None


def _split(graph: ir.Graph, before: ir.Node, cache: ir.Value) -> tuple[ir.Value, ir.Value]:
    """cache [B, K, T, D] -> all rows but the last [B, K, T - 1, D], and the last [B, 1, K * D]."""
    start, minus_one, end, axis = (constant(graph, "donor", name, [value]) for name, value in _BOUNDS)
    rows = constant(graph, "donor", "row", [0, 1, -1])
    earlier = ir.node("Slice", [cache, start, minus_one, axis])
    last = ir.node("Slice", [cache, minus_one, end, axis])
    transposed = ir.node("Transpose", [last.outputs[0]], {"perm": [0, 2, 1, 3]})
    flat = ir.node("Reshape", [transposed.outputs[0], rows])
    graph.insert_before(before, [earlier, last, transposed, flat])
    return earlier.outputs[0], flat.outputs[0]


_BOUNDS = (("start", 0), ("last", -1), ("end", _END), ("axis", 2))
