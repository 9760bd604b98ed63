"""An exported artifact beside the checkpoint that it was made of: its decoder, and the encoders that are asked for."""

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


def verify_artifact(
    artifact: Path,
    model: str,
    revision: str | None,
    slice_name: str | None,
    table: Path | None,
    provider: str,
    prompts: int,
    prompt_tokens: int | None,
    new_tokens: int,
    seed: int,
    modalities: Sequence[str] | None,
) -> ArtifactParity:
    """Compares on random inputs; the arguments are the options of `gemma3n verify`.

    Raises:
        ExportOptionError: the artifact lacks one of `modalities`.
        ExportError: the artifact is not of this checkpoint and slice, or transformers cannot run it.
    """
    loaded = OnnxGemma3n.from_pretrained(artifact, provider)
    there = loaded.manifest.modalities
    wanted = there if modalities is None else modalities
    if lacking := sorted(set(wanted) - set(there)):
        raise ExportOptionError(f"{artifact} has no {lacking[0]} to compare; it holds {', '.join(there)}.")
    checkpoint = Checkpoint.open(model, revision)
    chosen = slice_name or (None if loaded.manifest.slice == "whole" else loaded.manifest.slice)
    length = prompt_tokens or 2 * checkpoint.text_config.sliding_window + 5
    rng = np.random.default_rng(seed)
    texts = random_prompts(loaded, rng, prompts, length)
    decoder = verify(loaded, checkpoint, chosen, table, texts, new_tokens)
    verified = (verify_encoder(loaded, checkpoint, name, rng) for name in ENCODER_MODULES if name in wanted)
    return ArtifactParity(decoder, tuple(verified))
