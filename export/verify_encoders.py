"""Parity of an artifact's encoders with transformers' (and timm's, which it takes its vision tower from)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gemma3n_onnx.runtime.artifact import LogMelInfo
from gemma3n_onnx.runtime.audio import LogMel
from gemma3n_onnx.runtime.model import OnnxGemma3n

from .checkpoint import Checkpoint
from .reference import load_encoder, stored_in

# Largest error of a feature as a share of the features' range; encoders compute in fp32 whatever they are stored in.
TOLERANCE = 1e-4
QUANTIZED_TOLERANCE = 5e-2  # products take activations in int8
CLIP_SECONDS = (1.0, 5.3, 30.0)


@dataclass(frozen=True)
class EncoderParity:
    """`errors` of each input that was tried, as shares of the range."""

    modality: str
    errors: Mapping[str, float]
    tolerance: float

    @property
    def passed(self) -> bool:
        return max(self.errors.values()) <= self.tolerance


def verify_encoder(
    model: OnnxGemma3n, checkpoint: Checkpoint, modality: str, rng: np.random.Generator
) -> EncoderParity:
    """Compares the features of random inputs of each size with transformers' in fp32, on the weights as stored.

    Raises:
        ExportError: transformers cannot build the encoder, for instance because timm is not installed.
    """
    encode = load_encoder(checkpoint, modality, stored_in(model.manifest))
    errors = {}
    for name, inputs in _inputs(model, modality, rng).items():
        ours = model.encoders.features(modality, inputs)
        theirs = encode(*inputs.values())
        errors[name] = float(np.abs(ours - theirs).max() / np.ptp(theirs))
    return EncoderParity(modality, errors, QUANTIZED_TOLERANCE if model.manifest.quantization else TOLERANCE)


def describe(parity: EncoderParity) -> str:
    errors = ", ".join(f"{name} {error:.2e}" for name, error in parity.errors.items())
    verdict = "PASS" if parity.passed else "FAIL"
    return (
        f"{parity.modality} encoder against transformers (fp32), error of the range: {errors}\n"
        f"{verdict} (tolerance {parity.tolerance:.0e})"
    )


def _inputs(model: OnnxGemma3n, modality: str, rng: np.random.Generator) -> dict[str, dict[str, np.ndarray]]:
    manifest = model.manifest
    if modality == "vision" and manifest.vision is not None:
        name = manifest.vision.graph.inputs[0].name
        sizes = manifest.vision.image_sizes
        return {f"{size} px": {name: rng.random((1, 3, size, size), dtype=np.float32)} for size in sizes}
    assert manifest.audio is not None
    names = [tensor.name for tensor in manifest.audio.graph.inputs]
    log_mel = manifest.audio.log_mel
    return {f"{s} s": dict(zip(names, random_clip(log_mel, s, rng))) for s in CLIP_SECONDS}


def random_clip(info: LogMelInfo, seconds: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Features [1, T, mels] and mask [1, T] of a rising tone in noise."""
    time_s = np.arange(int(seconds * info.sample_rate_hz)) / info.sample_rate_hz
    tone = 0.3 * np.sin(2 * np.pi * (200 + 40 * time_s) * time_s)
    features, mask = LogMel(info)((tone + 0.01 * rng.standard_normal(len(time_s))).astype(np.float32))
    return features[None], mask[None]
