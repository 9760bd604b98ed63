"""Fuses the embedding graph into a decoder, which then takes token ids.

Matches: a decoder with the inputs `inputs_embeds` and `per_layer_inputs`, and an embedding graph that computes both
from `input_ids` alone. Weights keep their names; nodes, values and constants of the embedding get a prefix.
Refuses: an embedding graph with other inputs (AssertionError).
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from gemma3n_onnx.graphs.names import INPUT_IDS

_PREFIX = "embedding."


class FuseEmbedding(InPlacePass):
    def __init__(self, embedding: ir.Model) -> None:
        super().__init__()
        self.embedding = embedding.clone()

    def call(self, model: ir.Model) -> PassResult:
        graph, before = model.graph, self.embedding.graph
        (ids,) = before.inputs
        assert ids.name == INPUT_IDS, f"the embedding takes {ids.name}"
        made = {value.name: value for value in before.outputs}
        first, nodes = graph[0], [*before]
        before.outputs.clear()
        before.inputs.clear()
        before.remove(nodes)
        for name, value in [*before.initializers.items()]:
            before.initializers.pop(name)
            if value.const_value is not None:
                value.name = _PREFIX + name
            graph.initializers[value.name] = value  # type: ignore[index]
        for node in nodes:
            node.name = _PREFIX + (node.name or "")
            for value in node.outputs:
                value.name = _PREFIX + (value.name or "")
        graph.insert_before(first, nodes)
        for value in [*graph.inputs]:
            if value.name in made:
                graph.inputs.remove(value)
                value.replace_all_uses_with(made[value.name])
        graph.inputs.insert(0, ids)
        model.opset_imports.update(self.embedding.opset_imports)
        return PassResult(model, modified=True)
