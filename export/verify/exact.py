"""Loads an artifact's graphs without the rounding of activations."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from gemma3n_onnx.graphs.passes.exact_products import ExactProducts
from gemma3n_onnx.runtime.artifact import Manifest
from gemma3n_onnx.runtime.engine.providers.base import ExecutionProvider


def takes_int8(manifest: Manifest) -> bool:
    """Whether products with quantized weights round their activations to int8, as on the CPU."""
    return bool(manifest.quantization) and manifest.compute_dtype == "fp32"


def exact_provider(provider: ExecutionProvider) -> ExecutionProvider:
    """A provider that computes matrix products in fp32, even without bf16 support."""
    return provider.exact(_exact)


def _exact(path: Path) -> bytes:
    graph = ir.load(path)
    ExactProducts()(graph)
    return ir.to_proto(graph).SerializeToString()
