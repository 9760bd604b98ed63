"""Trains the decoder of all MatFormer slices at once, on conversations about encoded pictures and sounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from gemma3n_onnx.export.slicing import Slice, SliceSpec, resolve
from gemma3n_onnx.graphs.config import TextConfig
from gemma3n_onnx.graphs.embedder import MultimodalEmbedder

from .conversations import QUESTIONS, random_row
from .decoder import Sequences, SlicedModel
from .optimizer import Optimizer
from .pictures import Picture
from .progress import Progress
from .prompts import ConversationEncoder, LabelledSoftTokens
from .sounds import MAX_BEEPS, Sound

STEPS = 480
GLIMPSES = {"text": (22, 4), "picture": (20, 4), "sound": (6, 4), "both": (14, 4)}
BATCHES = {"text": (20, 4), "picture": (7, 8), "sound": (3, 6), "both": (4, 8)}
"""Rows of each kind in a step, and conversations in each row."""
GLIMPSE_SHARE = 0.7
"""Of the steps, the first so many are taken with a few of the soft tokens, which is faster: there is time for more."""
PICTURE_SHARES, SOUND_SHARES = (0.4, 0.04), (1.0, 0.04)
"""Kept of the soft tokens that show or sound something, and of the others."""
LESSON_WEIGHT = 0.3
"""Of what the decoder ought to look at, in the loss. Without it hundreds of steps more go by before a colour is tied to
its shape."""
WEIGHT_DECAY = 0.5
"""With next to none, the decoder learns by heart what pairs of numbers make, and fails on new ones."""
EQUAL_SHARE = 0.25
"""Of the rows about both, so many are made to have as many beeps as shapes."""
WHOLE_SHARE, NAMED_SHARE = 0.5, 0.35
"""Of the batches so many train the first slice of the table, which is whole, and one of its others; the rest train a
random mix of widths."""
WIDTHS = (1 / 2, 3 / 4, 1)


@dataclass(frozen=True)
class Media:
    """What conversations are about, with soft tokens [n, count, H] fp16, and, int64 [n, count], which of a picture's
    things each shows, as bits, which of a sound's are not silent, as 1, and which first hears a beep, as its number."""

    pictures: Sequence[Picture]
    picture_features: Tensor
    picture_shows: Tensor
    sounds: Sequence[Sound]
    sound_features: Tensor
    sound_matters: Tensor
    sound_counts: Tensor

    @cached_property
    def by_beeps(self) -> dict[int, list[int]]:
        """The numbers of the sounds with so many beeps."""
        return {n: [i for i, sound in enumerate(self.sounds) if sound.beeps == n] for n in range(MAX_BEEPS + 1)}


def train_decoder(
    weights: Mapping[str, Tensor],
    config: TextConfig,
    table: Sequence[SliceSpec],
    media: Media,
    embedders: tuple[MultimodalEmbedder, MultimodalEmbedder],
    encoder: ConversationEncoder,
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
    optimizer = Optimizer(matrices, others, STEPS, weight_decay=WEIGHT_DECAY)
    hard_rows = hard_rows_of(embedders)
    named = [resolve(spec, config) for spec in table]
    models = [SlicedModel(chosen) for chosen in named]

    def losses() -> Iterator[Tensor]:
        glimpses = step < GLIMPSE_SHARE * STEPS
        for kind, size in (GLIMPSES if glimpses else BATCHES).items():
            chance = rng.random()
            if chance < WHOLE_SHARE:
                model = models[0]
            elif chance < WHOLE_SHARE + NAMED_SHARE:
                model = models[int(rng.integers(1, len(models)))]
            else:
                model = SlicedModel(_random_slice(rng, config, named))
            batch = random_batch(rng, kind, size, media, encoder, glimpses=glimpses)
            entropy, lesson = model.losses(weights, hard_rows, encoder.soft_ids, batch)
            yield entropy + LESSON_WEIGHT * lesson

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
    rng: np.random.Generator,
    kind: str,
    size: tuple[int, int],
    media: Media,
    encoder: ConversationEncoder,
    *,
    glimpses: bool,
) -> Sequences:
    """`size`: rows, and conversations in each. `glimpses`: with only some of the soft tokens."""
    rows, soft_tokens = [], []
    for _ in range(size[0]):
        picture, sound = (int(rng.integers(len(pool))) for pool in (media.pictures, media.sounds))
        if kind == "both" and rng.random() < EQUAL_SHARE:
            sound = int(rng.choice(media.by_beeps[len(media.pictures[picture].things)]))
        seen = media.pictures[picture] if kind in ("picture", "both") else None
        heard = media.sounds[sound] if kind in ("sound", "both") else None
        row = random_row(rng, seen, heard, size[1], QUESTIONS)
        rows.append(row)
        none = LabelledSoftTokens.plain(media.picture_features[0, :0].float())
        parts = (
            _seen(media, picture, rng, glimpses) if name == "image" else _heard(media, sound, rng, glimpses)
            for name in row[0].media_kinds
        )
        soft_tokens.append(LabelledSoftTokens.joined([none, *parts]))
    return encoder.batch(rows, soft_tokens)


def _seen(media: Media, picture: int, rng: np.random.Generator, glimpses: bool) -> LabelledSoftTokens:
    shows = media.picture_shows[picture]
    soft = replace(LabelledSoftTokens.plain(media.picture_features[picture].float()), shows=shows)
    return replace(soft, kept=_glimpse(rng, shows, PICTURE_SHARES)) if glimpses else soft


def _heard(media: Media, sound: int, rng: np.random.Generator, glimpses: bool) -> LabelledSoftTokens:
    soft = replace(LabelledSoftTokens.plain(media.sound_features[sound].float()), counts=media.sound_counts[sound])
    return replace(soft, kept=_glimpse(rng, media.sound_matters[sound], SOUND_SHARES)) if glimpses else soft


def _glimpse(rng: np.random.Generator, matters: Tensor, shares: tuple[float, float]) -> Tensor:
    """Some of the soft tokens, at least one of every value of `matters`."""
    values = matters.numpy()
    kept = rng.random(len(values)) < np.where(values > 0, *shares)
    for value in np.unique(values):
        kept[rng.choice(np.flatnonzero(values == value))] = True
    return torch.from_numpy(kept)


@torch.no_grad()
def hard_rows_of(embedders: tuple[MultimodalEmbedder, MultimodalEmbedder]) -> Tensor:
    """Embeddings [n, H] of the multimodal ids that end the vocabulary."""
    return torch.cat([embedder.hard(embedder.embedding.weight) for embedder in embedders])
