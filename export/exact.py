"""Quantized artifacts whose products take their activations as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from gemma3n_onnx.graphs.passes.exact_activations import ExactActivations
from gemma3n_onnx.runtime.artifact import Manifest
from gemma3n_onnx.runtime.session import Profile


def takes_int8(manifest: Manifest) -> bool:
    """Whether products of quantized weights round their activations: those of the CPU do."""
    return bool(manifest.quantization) and manifest.compute_dtype == "fp32"


def exact_profile(profile: Profile) -> Profile:
    return replace(profile, rewritten=_exact)


def _exact(path: Path) -> bytes:
    graph = ir.load(path)
    ExactActivations()(graph)
    return ir.to_proto(graph).SerializeToString()
