"""Parity of an artifact's encoders with transformers' (the vision tower is timm's)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.runtime.artifact import LogMelInfo, Manifest
from gemma3n_onnx.runtime.engine.encoders import Encoders
from gemma3n_onnx.runtime.media.audio import LogMel
from gemma3n_onnx.runtime.model import OnnxGemma3n

from .exact import exact_provider, takes_int8
from .parity import AS_MUCH
from .reference import load_encoder, stored_in_encoder

# Maximum error of a feature relative to the range of the features.
TOLERANCE = 1e-4
CLIP_SECONDS = (1.0, 5.3, 30.0)

Encode = Callable[[Mapping[str, np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class EncoderParity:
    """`errors` by input, relative to the range. If products are `rounded` (to int8 or bf16), `exact` has the errors of
    the same graph with products in fp32, and `cost` the errors of transformers with the same rounding."""

    modality: str
    rounded: str | None
    errors: Mapping[str, float]
    exact: Mapping[str, float] | None
    cost: Mapping[str, float] | None

    @property
    def passed(self) -> bool:
        if self.exact is None or self.cost is None:
            return max(self.errors.values()) <= TOLERANCE
        as_much = all(error <= AS_MUCH * self.cost[name] for name, error in self.errors.items())
        return max(self.exact.values()) <= TOLERANCE and as_much


def verify_encoder(
    model: OnnxGemma3n, checkpoint: Checkpoint, modality: str, rng: np.random.Generator
) -> EncoderParity:
    """Compares features of random inputs of each size with transformers in fp32 on the stored weights.

    Raises:
        ExportError: transformers cannot build the encoder, for example because timm is not installed.
    """
    tried = _inputs(model, modality, rng)

    def run(encode: Encode) -> dict[str, np.ndarray]:
        return {name: encode(inputs) for name, inputs in tried.items()}

    def transformers(products: str | None) -> dict[str, np.ndarray]:
        encode = load_encoder(checkpoint, modality, stored_in_encoder(model.manifest, modality), products)
        return run(lambda inputs: encode(*inputs.values()))

    theirs = transformers(None)
    errors = _errors(run(partial(model.encoders.features, modality)), theirs)
    if (products := _rounded(model.manifest, modality)) is None:
        return EncoderParity(modality, None, errors, None, None)
    encoders = Encoders(model.folder, model.manifest, exact_provider(model.engine.provider))
    exact = _errors(run(partial(encoders.features, modality)), theirs)
    return EncoderParity(modality, products, errors, exact, _errors(transformers(products), theirs))


def _rounded(manifest: Manifest, modality: str) -> str | None:
    if takes_int8(manifest):
        return "int8"
    dtype = manifest.encoders[modality].compute_dtype
    return None if dtype == "fp32" else dtype


def _errors(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: float(np.abs(ours[name] - theirs[name]).max() / np.ptp(theirs[name])) for name in theirs}


def describe(parity: EncoderParity) -> str:
    def listed(errors: Mapping[str, float]) -> str:
        return ", ".join(f"{name} {error:.2e}" for name, error in errors.items())

    lines = [f"{parity.modality} encoder against transformers (fp32), error of the range: {listed(parity.errors)}"]
    bound = ""
    if parity.exact is not None and parity.cost is not None:
        lines += [
            f"  the same graph with unrounded products: {listed(parity.exact)}",
            f"  transformers with products rounded to {parity.rounded}: {listed(parity.cost)}",
        ]
        bound = f" with unrounded products, {AS_MUCH:g} times the error of rounding with rounded ones"
    verdict = "PASS" if parity.passed else "FAIL"
    return "\n".join([*lines, f"{verdict} (tolerance {TOLERANCE:.0e}{bound})"])


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
