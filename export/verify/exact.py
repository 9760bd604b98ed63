"""Artifacts whose products take their activations as they are, not rounded."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from gemma3n_onnx.graphs.passes.exact_products import ExactProducts
from gemma3n_onnx.runtime.artifact import Manifest
from gemma3n_onnx.runtime.engine.providers.base import ExecutionProvider


def takes_int8(manifest: Manifest) -> bool:
    """Whether products of quantized weights round their activations: those of the CPU do."""
    return bool(manifest.quantization) and manifest.compute_dtype == "fp32"


def exact_provider(provider: ExecutionProvider) -> ExecutionProvider:
    """Loads graphs whose products are in fp32, also on a provider without bf16."""
    return provider.exact(_exact)


def _exact(path: Path) -> bytes:
    graph = ir.load(path)
    ExactProducts()(graph)
    return ir.to_proto(graph).SerializeToString()
