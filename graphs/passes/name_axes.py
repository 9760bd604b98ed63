"""Renames dynamic axes of inputs and outputs for consumers that look them up by name.

Matches: every axis whose name is a key of `names`.
Refuses: nothing else is touched.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult


class NameAxes(InPlacePass):
    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__()
        self.names = dict(names)

    def call(self, model: ir.Model) -> PassResult:
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.shape is not None:
                axes = [axis if isinstance(axis, int) else str(axis.value) for axis in value.shape]
                value.shape = ir.Shape([self.names.get(axis, axis) if isinstance(axis, str) else axis for axis in axes])
        return PassResult(model, modified=True)
