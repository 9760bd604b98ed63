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

from .conversations import random_row
from .decoder import Sequences, SlicedModel
from .optimizer import Optimizer
from .pictures import Picture
from .progress import Progress
from .prompts import Encoder
from .sounds import Sound

STEPS = 600
BATCHES = {"text": (6, 8), "picture": (6, 16), "sound": (3, 6), "both": (2, 10)}
"""Rows of each kind in a step, and conversations in each row."""
SPARSE_SHARE = 0.6
"""Of the steps, the first so many leave out most soft tokens that say nothing, which is faster and easier."""
KEPT_SHARE = 0.1
"""Of those that say nothing."""
WHOLE_SHARE, NAMED_SHARE = 0.5, 0.35
"""Of the batches so many train the first slice of the table, which is whole, and one of its others; the rest train a
random mix of widths."""
WIDTHS = (1 / 2, 3 / 4, 1)


@dataclass(frozen=True)
class Media:
    """What conversations are about, with soft tokens [n, count, H] fp16, and which of these, bool [n, count], show or
    sound anything."""

    pictures: Sequence[Picture]
    picture_features: Tensor
    picture_matters: Tensor
    sounds: Sequence[Sound]
    sound_features: Tensor
    sound_matters: Tensor


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
        for kind, size in BATCHES.items():
            chance = rng.random()
            if chance < WHOLE_SHARE:
                model = models[0]
            elif chance < WHOLE_SHARE + NAMED_SHARE:
                model = models[int(rng.integers(1, len(models)))]
            else:
                model = SlicedModel(_random_slice(rng, config, named))
            batch = random_batch(rng, kind, size, media, encoder, sparse=step < SPARSE_SHARE * STEPS)
            yield model.loss(weights, hard_rows, encoder.soft_ids, batch)

    for step in range(STEPS):
        progress.step(step + 1, STEPS, optimizer.step(losses()))


def _is_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and not any(part in name for part in ("embed_tokens", "altup.", "norm"))


def _random_slice(rng: np.random.Generator, config: TextConfig, named: Sequence[Slice]) -> Slice:
    """Layers as one of `named` keeps them, each of a width of its own."""
    keep = named[int(rng.integers(len(named)))]
    widths = (int(config.intermediate_sizes[i] * rng.choice(WIDTHS)) for i in keep.keep)
    return resolve(SliceSpec("random", tuple(widths), keep.skipped), config)


def random_batch(
    rng: np.random.Generator, kind: str, size: tuple[int, int], media: Media, encoder: Encoder, *, sparse: bool
) -> Sequences:
    """`size`: rows, and conversations in each. `sparse`: without most soft tokens that say nothing."""
    rows, kept = [], []
    features = [media.picture_features[0, :0]]
    for _ in range(size[0]):
        picture, sound = (int(rng.integers(len(pool))) for pool in (media.pictures, media.sounds))
        seen = media.pictures[picture] if kind in ("picture", "both") else None
        heard = media.sounds[sound] if kind in ("sound", "both") else None
        row = random_row(rng, seen, heard, size[1])
        rows.append(row)
        of_kind = {
            "image": (media.picture_features[picture], media.picture_matters[picture]),
            "audio": (media.sound_features[sound], media.sound_matters[sound]),
        }
        kept_of_row = [torch.zeros(0, dtype=torch.bool)]
        for name in row[0].media_kinds:
            soft_tokens, matters = of_kind[name]
            some = torch.from_numpy(rng.random(len(matters)) < KEPT_SHARE) if sparse else True
            kept_of_row.append(matters | some)
            features.append(soft_tokens[kept_of_row[-1]])
        kept.append(torch.cat(kept_of_row))
    return encoder.batch(rows, torch.cat(features).float(), kept)


@torch.no_grad()
def hard_rows_of(embedders: tuple[MultimodalEmbedder, MultimodalEmbedder]) -> Tensor:
    """Embeddings [n, H] of the multimodal ids that end the vocabulary."""
    return torch.cat([embedder.hard(embedder.embedding.weight) for embedder in embedders])
