"""Trains the decoder of all MatFormer slices at once, on conversations about encoded pictures and sounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gemma3n_onnx.export.slicing import Slice, SliceSpec, resolve
from gemma3n_onnx.graphs.config import TextConfig
from gemma3n_onnx.graphs.embedder import MultimodalEmbedder

from .conversations import random_conversation
from .decoder import Sequences, SlicedModel
from .optimizer import Optimizer
from .pictures import Picture
from .progress import Progress
from .prompts import Encoder
from .sounds import Sound

STEPS = 600
BATCHES = {"text": 32, "picture": 12, "sound": 8, "both": 4}
"""Conversations of each kind in a step."""
NAMED_SHARE = 0.7
"""So many steps train a slice of the table, the first one, which is whole, twice as often; the others a random mix."""
WIDTHS = (1 / 2, 3 / 4, 1)


@dataclass(frozen=True)
class Media:
    """What conversations are about, with soft tokens [n, count, H] fp16."""

    pictures: Sequence[Picture]
    picture_features: Tensor
    sounds: Sequence[Sound]
    sound_features: Tensor


def train_decoder(
    weights: Mapping[str, Tensor],
    config: TextConfig,
    table: Sequence[SliceSpec],
    media: Media,
    embedders: tuple[MultimodalEmbedder, MultimodalEmbedder],
    encoder: Encoder,
    seed: int,
    progress: Progress,
) -> None:
    """Trains `weights`, the decoder's by their names in a checkpoint, tables included.

    `table`: the slices that must work; `embedders`: of vision and audio, whose hard tokens the decoder reads.
    """
    progress.stage("Training the decoder")
    rng = np.random.default_rng([seed, 1])
    matrices = [tensor for name, tensor in weights.items() if _is_matrix(name, tensor)]
    others = [tensor for name, tensor in weights.items() if not _is_matrix(name, tensor)]
    optimizer = Optimizer(matrices, others, STEPS)
    hard_rows = hard_rows_of(embedders)
    named = [resolve(spec, config) for spec in table]
    models = [SlicedModel(chosen) for chosen in named]

    def losses() -> Iterator[Tensor]:
        for kind, count in BATCHES.items():
            if rng.random() < NAMED_SHARE:
                model = models[max(int(rng.integers(len(models) + 1)) - 1, 0)]
            else:
                model = SlicedModel(_random_slice(rng, config, named))
            yield model.loss(weights, hard_rows, encoder.soft_ids, random_batch(rng, kind, count, media, encoder))

    for step in range(STEPS):
        progress.step(step + 1, STEPS, optimizer.step(losses()))


def _is_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and not any(part in name for part in ("embed_tokens", "altup.", "norm"))


def _random_slice(rng: np.random.Generator, config: TextConfig, named: Sequence[Slice]) -> Slice:
    """Layers as one of `named` keeps them, each of a width of its own."""
    keep = named[int(rng.integers(len(named)))]
    widths = (int(config.intermediate_sizes[i] * rng.choice(WIDTHS)) for i in keep.keep)
    return resolve(SliceSpec("random", tuple(widths), keep.skipped), config)


def random_batch(rng: np.random.Generator, kind: str, count: int, media: Media, encoder: Encoder) -> Sequences:
    conversations, features = [], []
    for _ in range(count):
        picture, sound = (int(rng.integers(len(pool))) for pool in (media.pictures, media.sounds))
        seen = media.pictures[picture] if kind in ("picture", "both") else None
        heard = media.sounds[sound] if kind in ("sound", "both") else None
        conversation = random_conversation(rng, seen, heard)
        conversations.append(conversation)
        of_kind = {"image": media.picture_features[picture], "audio": media.sound_features[sound]}
        features += [of_kind[name] for name in conversation.media_kinds]
    nothing = media.picture_features[0, :0]
    return encoder.batch(conversations, torch.cat([nothing, *features]).float())


@torch.no_grad()
def hard_rows_of(embedders: tuple[MultimodalEmbedder, MultimodalEmbedder]) -> Tensor:
    """Embeddings [n, H] of the multimodal ids that end the vocabulary."""
    return torch.cat([embedder.hard(embedder.embedding.weight) for embedder in embedders])
