"""Compares an artifact with its checkpoint: the decoder, and the requested encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma3n_onnx.export.checkpoint.checkpoint import ENCODER_MODULES, Checkpoint
from gemma3n_onnx.export.errors import ExportOptionError
from gemma3n_onnx.runtime.model import OnnxGemma3n

from .encoders import EncoderParity, verify_encoder
from .encoders import describe as describe_encoder
from .parity import Parity, random_prompts, verify
from .parity import describe as describe_decoder


@dataclass(frozen=True)
class ArtifactParity:
    decoder: Parity
    encoders: tuple[EncoderParity, ...]

    @property
    def passed(self) -> bool:
        return self.decoder.passed and all(encoder.passed for encoder in self.encoders)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self.decoder), "encoders": [*map(asdict, self.encoders)], "passed": self.passed}

    def describe(self) -> str:
        return "\n".join([describe_decoder(self.decoder), *map(describe_encoder, self.encoders)])


@dataclass(frozen=True)
class VerifyOptions:
    """The options of `gemma3n verify`. `slice` None: the artifact's own; `modalities` None: all of the artifact's;
    `prompt_tokens` None: a little more than twice the sliding window."""

    revision: str | None = None
    slice: str | None = None
    matformer_config: Path | None = None
    provider: str = "auto"
    prompts: int = 2
    prompt_tokens: int | None = None
    new_tokens: int = 64
    seed: int = 0
    modalities: Sequence[str] | None = None


def verify_artifact(artifact: Path, model: str, options: VerifyOptions) -> ArtifactParity:
    """Compares outputs on random inputs; `model` is the folder or Hub id of the checkpoint.

    Raises:
        ExportOptionError: the artifact lacks one of the modalities.
        ExportError: the artifact is not from this checkpoint and slice, or transformers cannot run it.
    """
    loaded = OnnxGemma3n.from_pretrained(artifact, options.provider)
    held = loaded.manifest.modalities
    wanted = held if options.modalities is None else options.modalities
    if lacking := sorted(set(wanted) - set(held)):
        raise ExportOptionError(f"{artifact} has no {lacking[0]} to compare; its modalities are {', '.join(held)}.")
    checkpoint = Checkpoint.open(model, options.revision)
    chosen = options.slice or (None if loaded.manifest.slice == "whole" else loaded.manifest.slice)
    length = options.prompt_tokens or 2 * checkpoint.text_config.sliding_window + 5
    rng = np.random.default_rng(options.seed)
    texts = random_prompts(loaded, rng, options.prompts, length)
    decoder = verify(loaded, checkpoint, chosen, options.matformer_config, texts, options.new_tokens)
    verified = (verify_encoder(loaded, checkpoint, name, rng) for name in ENCODER_MODULES if name in wanted)
    return ArtifactParity(decoder, tuple(verified))
