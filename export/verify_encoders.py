"""Parity of an artifact's encoders with transformers' (and timm's, which it takes its vision tower from)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from gemma3n_onnx.runtime.artifact import LogMelInfo
from gemma3n_onnx.runtime.audio import LogMel
from gemma3n_onnx.runtime.model import OnnxGemma3n

from .checkpoint import ENCODER_MODULES, Checkpoint
from .errors import ExportError
from .weights import as_torch, rounded

# Largest error of a feature as a share of the features' range; encoders compute in fp32 whatever they are stored in.
TOLERANCE = 1e-4
CLIP_SECONDS = (1.0, 5.3, 30.0)

Encode = Callable[..., np.ndarray]


@dataclass(frozen=True)
class EncoderParity:
    """`errors` of each input that was tried, as shares of the range."""

    modality: str
    errors: Mapping[str, float]
    tolerance: float = TOLERANCE

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
    reference = load_reference_encoder(checkpoint, modality, model.manifest.token_embeddings.dtype)
    errors = {}
    for name, inputs in _inputs(model, modality, rng).items():
        ours = model.encoders.features(modality, inputs)
        theirs = reference(*inputs.values())
        errors[name] = float(np.abs(ours - theirs).max() / np.ptp(theirs))
    return EncoderParity(modality, errors)


def describe(parity: EncoderParity) -> str:
    errors = ", ".join(f"{name} {error:.2e}" for name, error in parity.errors.items())
    verdict = "PASS" if parity.passed else "FAIL"
    return (
        f"{parity.modality} encoder against transformers (fp32), error of the range: {errors}\n"
        f"{verdict} (tolerance {parity.tolerance:.0e})"
    )


def load_reference_encoder(checkpoint: Checkpoint, modality: str, stored_as: str | None = None) -> Encode:
    """transformers' encoder and embedder in fp32, on the weights rounded to `stored_as`: inputs to [count, H].

    Raises:
        ExportError: it cannot be built.
    """
    from transformers import Gemma3nConfig

    config = Gemma3nConfig(**checkpoint.config)
    section = getattr(config, f"{modality}_config")
    tower = _load(checkpoint, ENCODER_MODULES[modality][0], _build_tower(section, modality), stored_as)
    embedder = _load_embedder(checkpoint, config, modality, stored_as)

    @torch.no_grad()
    def see(pixel_values: np.ndarray) -> np.ndarray:
        found = tower(pixel_values=torch.from_numpy(pixel_values), do_pooling=False).last_hidden_state
        return embedder(inputs_embeds=found.flatten(2).mT * section.hidden_size**0.5).flatten(0, 1).numpy()

    @torch.no_grad()
    def hear(features: np.ndarray, mask: np.ndarray) -> np.ndarray:
        found = tower(torch.from_numpy(features), ~torch.from_numpy(mask))
        last_id = torch.tensor([[section.vocab_offset + section.vocab_size - 1]])
        padding = embedder(input_ids=last_id)
        soft = torch.where(found.audio_mel_mask[..., None], padding, embedder(inputs_embeds=found.last_hidden_state))
        missing = padding.expand(len(soft), checkpoint.config["audio_soft_tokens_per_image"] - soft.shape[1], -1)
        return torch.cat([soft, missing], dim=1).flatten(0, 1).numpy()

    return see if modality == "vision" else hear


def load_hard_rows(checkpoint: Checkpoint, stored_as: str | None = None) -> torch.Tensor:
    """The embeddings [n, H] of all ids that the embedders have rows for, as transformers computes them."""
    from transformers import Gemma3nConfig

    config = Gemma3nConfig(**checkpoint.config)
    rows = []
    for modality in ENCODER_MODULES:
        section = getattr(config, f"{modality}_config")
        ids = torch.arange(section.vocab_size)[None] + section.vocab_offset
        with torch.no_grad():
            rows.append(_load_embedder(checkpoint, config, modality, None)(input_ids=ids)[0])
    scale = checkpoint.text_config.hidden_size**0.5
    return rounded(torch.cat(rows) / scale, stored_as) * scale


def _build_tower(section: Any, modality: str) -> nn.Module:
    from transformers import AutoModel

    try:
        return AutoModel.from_config(section)
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ExportError(
            f"transformers cannot build the {modality} encoder here ({reason}); install timm and a torchvision that "
            "fits this torch, or name the others with --modalities."
        ) from error


def _load_embedder(checkpoint: Checkpoint, config: Any, modality: str, stored_as: str | None) -> nn.Module:
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nMultimodalEmbedder

    embedder = Gemma3nMultimodalEmbedder(getattr(config, f"{modality}_config"), config.text_config)
    return _load(checkpoint, ENCODER_MODULES[modality][1], embedder, stored_as)


def _load(checkpoint: Checkpoint, name: str, module: nn.Module, stored_as: str | None) -> nn.Module:
    """The module in fp32, with all its weights from the checkpoint, rounded to `stored_as`."""
    weights = {
        key: as_torch(checkpoint.raw_read(checkpoint.encoder_raw_name(f"{name}.{key}"))).float()
        for key in module.state_dict()
    }
    module = module.float().eval()
    module.load_state_dict({k: rounded(value, stored_as) for k, value in weights.items()}, strict=True, assign=True)
    return module


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
