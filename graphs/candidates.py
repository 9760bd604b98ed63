"""A graph that returns the top logits, so that sampling with a small top-k copies only these to the host."""

from __future__ import annotations

import onnx_ir as ir

from . import names

CANDIDATES = 128


def candidates(vocab_size: int, opset: int) -> ir.Model:
    """logits [B, 1, V] fp32 -> candidate_logits [B, 1, n] fp32, sorted descending, and candidate_ids [B, 1, n] int64,
    with n = min(`CANDIDATES`, V)."""
    count = min(CANDIDATES, vocab_size)
    logits = _value(names.LOGITS, ir.DataType.FLOAT, vocab_size)
    number = ir.tensor([count], dtype=ir.DataType.INT64, name="count")
    initializer = ir.Value(name="count", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64), const_value=number)
    outputs = [
        _value(names.CANDIDATE_LOGITS, ir.DataType.FLOAT, count),
        _value(names.CANDIDATE_IDS, ir.DataType.INT64, count),
    ]
    node = ir.node(
        "TopK", [logits, initializer], {"axis": 2, "largest": 1, "sorted": 1}, outputs=outputs, name="choose"
    )
    graph = ir.Graph([logits], outputs, nodes=[node], initializers=[initializer], opset_imports={"": opset})
    return ir.Model(graph, ir_version=10)


def _value(name: str, dtype: ir.DataType, width: int) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([names.BATCH, 1, width]))
