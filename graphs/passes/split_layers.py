"""Splits the last axis of `per_layer_inputs`: [B, S, L * C] becomes [B, S, L, C].

Matches: a graph with that input, which a Reshape flattens again, or that output.
Refuses: nothing; other nodes stay as they are.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from gemma3n_onnx.graphs.names import PER_LAYER_INPUTS


class SplitLayers(InPlacePass):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        for value in (*graph.inputs, *graph.outputs):
            if value.name == PER_LAYER_INPUTS:
                self._split(graph, value, taken=value in graph.inputs)
                return PassResult(model, modified=True)
        return PassResult(model, modified=False)

    def _split(self, graph: ir.Graph, flat: ir.Value, *, taken: bool) -> None:
        assert flat.shape is not None and flat.dtype is not None
        batch, length, width = flat.shape
        assert isinstance(width, int)
        apart = [batch, length, self.layers, width // self.layers]
        if taken:
            split = ir.Value(name=PER_LAYER_INPUTS, type=ir.TensorType(flat.dtype), shape=ir.Shape(apart))
            graph.inputs[graph.inputs.index(flat)] = split
            joined = _reshaped(graph, split, [0, 0, width])
            flat.name = None
            flat.replace_all_uses_with(joined)
            node = joined.producer()
            assert node is not None
            graph.insert_before(graph[0], node)
            joined.name = f"{PER_LAYER_INPUTS}.flat"
        else:
            flat.name = f"{PER_LAYER_INPUTS}.flat"
            split = _reshaped(graph, flat, [0, 0, *apart[2:]])  # type: ignore[list-item]
            split.name, split.type, split.shape = PER_LAYER_INPUTS, ir.TensorType(flat.dtype), ir.Shape(apart)
            node = split.producer()
            assert node is not None
            graph.append(node)
            graph.outputs[graph.outputs.index(flat)] = split


def _reshaped(graph: ir.Graph, value: ir.Value, sizes: list[int]) -> ir.Value:
    """The output of a Reshape that is not in the graph yet."""
    name = f"{PER_LAYER_INPUTS}.sizes"
    tensor = ir.tensor(sizes, dtype=ir.DataType.INT64, name=name)
    shape = ir.Value(name=name, shape=ir.Shape([len(sizes)]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor)
    graph.register_initializer(shape)
    return ir.node("Reshape", [value, shape], name=f"{PER_LAYER_INPUTS}.reshape").outputs[0]
