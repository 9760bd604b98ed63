"""Artifacts whose products take their activations as they are, not rounded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from gemma3n_onnx.graphs.passes.exact_products import ExactProducts
from gemma3n_onnx.runtime.artifact import Manifest
from gemma3n_onnx.runtime.engine.ort import Profile


def takes_int8(manifest: Manifest) -> bool:
    """Whether products of quantized weights round their activations: those of the CPU do."""
    return bool(manifest.quantization) and manifest.compute_dtype == "fp32"


def exact_profile(profile: Profile) -> Profile:
    """Loads graphs whose products are in fp32, for providers without bf16 too."""
    options = dict(profile.provider_options)
    if profile.device == "cuda":
        options["use_tf32"] = "0"
    dtypes = (*profile.compute_dtypes, "bf16")
    return replace(profile, rewritten=_exact, compute_dtypes=dtypes, provider_options=options)


def _exact(path: Path) -> bytes:
    graph = ir.load(path)
    ExactProducts()(graph)
    return ir.to_proto(graph).SerializeToString()
