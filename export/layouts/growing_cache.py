"""Shared by optimum and transformers.js: KV caches are outside the graph and grow by one token per step.

Only layers that produce K and V have a cache. Prompts and decode steps run the same graph.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gemma3n_onnx.export.errors import ExportOptionError
from gemma3n_onnx.export.quantization.precision import Precision
from gemma3n_onnx.graphs import names
from gemma3n_onnx.graphs.config import TextConfig

from .base import Layout, Requested

if TYPE_CHECKING:
    import onnx_ir as ir

AXES = {
    names.BATCH: "batch_size",
    names.NEW_TOKENS: "sequence_length",
    names.TOTAL_LENGTH: "total_sequence_length",
    names.CAPACITY: "past_sequence_length",
}
"""The names that both libraries expect for the axes of inputs and outputs."""


class GrowingCacheLayout(Layout):
    def check(self, requested: Requested) -> None:
        if requested.target != "cpu" or requested.logits != "last":
            raise ExportOptionError(f"--layout {self.name} needs --target cpu and --logits last; leave both out.")

    def precision(self, precision: Precision) -> Precision:
        return replace(precision, prefill=None)

    def adapt(self, decoder: ir.Model, embedding: ir.Model, config: TextConfig) -> None:
        from gemma3n_onnx.graphs.passes.mask_padding import MaskPadding
        from gemma3n_onnx.graphs.passes.split_donor_cache import SplitDonorCache

        MaskPadding()(decoder)  # both pad batches on the left
        SplitDonorCache()(decoder)  # their ONNX Runtime may be older than 1.31
