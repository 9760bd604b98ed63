"""Expands the calls of repeated parts in a traced graph; see `graphs.repeated`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from gemma3n_onnx.graphs.repeated import BEGIN, CALL, DOMAIN, END, KIND, Kinds


@dataclass(frozen=True)
class _Body:
    """The nodes between two marks. `inputs` are the values at the first mark, then the parameters; None for an unread
    parameter."""

    inputs: list[ir.Value | None]
    nodes: list[ir.Node]
    outputs: list[ir.Value]


def repeat_parts(model: ir.Model, kinds: Kinds) -> None:
    """Replaces each call with its kind's nodes on the call's inputs and parameters, and removes the marks."""
    graph = model.graph
    marks: dict[tuple[str, int], ir.Node] = {}
    calls = []
    for node in graph:
        if node.domain == DOMAIN:
            kind = node.attributes[KIND].as_int()
            if node.op_type == CALL:
                calls.append((node, kind))
            else:
                marks[node.op_type, kind] = node
    bodies = {kind.number: _body(graph, marks, kind.number, kind.parameters) for kind in kinds.values()}
    for call, kind in calls:
        _put_in_place(graph, call, bodies[kind])
    for mark in marks.values():
        _replace(graph, mark, mark.inputs)


def _body(graph: ir.Graph, marks: Mapping[tuple[str, int], ir.Node], number: int, parameters: list[str]) -> _Body:
    begin, end = marks[BEGIN, number], marks[END, number]
    inputs = [*begin.outputs, *(graph.initializers.get(name) for name in parameters)]
    found: dict[ir.Node, None] = {}
    open_values = list(end.inputs)
    while open_values:
        value = open_values.pop()
        node = value.producer() if value is not None else None
        if node is None or node is begin or node in found:
            assert value is None or not value.is_graph_input(), f"A repeated block reads {value} past its inputs."
            continue
        found[node] = None
        open_values += node.inputs
    return _Body(inputs, [node for node in graph if node in found], [v for v in end.inputs if v is not None])


def _put_in_place(graph: ir.Graph, call: ir.Node, body: _Body) -> None:
    values: dict[ir.Value, ir.Value | None] = {
        formal: actual for formal, actual in zip(body.inputs, call.inputs, strict=True) if formal is not None
    }
    nodes = []
    for node in body.nodes:
        inputs = [None if value is None else values.get(value, value) for value in node.inputs]
        clone = ir.node(node.op_type, inputs, node.attributes, domain=node.domain, num_outputs=len(node.outputs))
        for mine, theirs in zip(clone.outputs, node.outputs):
            mine.type = theirs.type
            values[theirs] = mine
        nodes.append(clone)
    graph.insert_before(call, nodes)
    _replace(graph, call, [values[value] for value in body.outputs])


def _replace(graph: ir.Graph, node: ir.Node, values: Sequence[ir.Value | None]) -> None:
    ir.convenience.replace_all_uses_with(node.outputs, [value for value in values if value is not None])
    graph.remove(node, safe=True)
