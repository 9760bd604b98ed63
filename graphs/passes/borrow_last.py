"""Has KV-shared layers read their donor's cache as a past of all tokens but the last, which they take as a new one.

Attention of ONNX Runtime before 1.31 wants at least one new key. This costs copies of the donors' caches.

Matches: every GroupQueryAttention whose past is what another one gives as present; its query is of one position.
Refuses: nothing else is touched.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

_ATTENTION = "GroupQueryAttention"
_END = (1 << 63) - 1


class BorrowLast(InPlacePass):
    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        borrowed: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        readers = [node for node in graph if node.op_type == _ATTENTION and _donor(node.inputs[3]) is not None]
        for node in readers:
            for new, past in ((1, 3), (2, 4)):
                cache = node.inputs[past]
                assert cache is not None
                if cache not in borrowed:
                    borrowed[cache] = _parted(graph, node, cache)
                earlier, last = borrowed[cache]
                node.replace_input_with(past, earlier)
                node.replace_input_with(new, last)
            # Without presents of its own it would write the new key behind the end of its past.
            node.resize_outputs(3)
            for value, part in zip(node.outputs[1:], ("key", "value")):
                value.name = f"{node.name}.{part}"
        return PassResult(model, modified=bool(readers))


def _donor(past: ir.Value | None) -> ir.Node | None:
    producer = None if past is None else past.producer()
    return producer if producer is not None and producer.op_type == _ATTENTION else None


def _parted(graph: ir.Graph, before: ir.Node, cache: ir.Value) -> tuple[ir.Value, ir.Value]:
    """A cache [B, K, T, D] without its last row, and that [B, 1, K * D]."""
    zero, minus, end, axis = (_constant(graph, f"borrowed.{name}", [value]) for name, value in _BOUNDS)
    rows = _constant(graph, "borrowed.row", [0, 1, -1])
    earlier = ir.node("Slice", [cache, zero, minus, axis])
    last = ir.node("Slice", [cache, minus, end, axis])
    turned = ir.node("Transpose", [last.outputs[0]], {"perm": [0, 2, 1, 3]})
    flat = ir.node("Reshape", [turned.outputs[0], rows])
    graph.insert_before(before, [earlier, last, turned, flat])
    return earlier.outputs[0], flat.outputs[0]


_BOUNDS = (("start", 0), ("last", -1), ("end", _END), ("axis", 2))


def _constant(graph: ir.Graph, name: str, values: list[int]) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(values, dtype=ir.DataType.INT64, name=name)
        of_type = ir.TensorType(ir.DataType.INT64)
        graph.register_initializer(ir.Value(name=name, shape=ir.Shape([len(values)]), type=of_type, const_value=tensor))
    return graph.initializers[name]
