"""Trains the decoder of all MatFormer slices at once, on conversations about encoded pictures and sounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gemma3n_onnx.export.slicing import Slice, SliceSpec, resolve
from gemma3n_onnx.graphs.config import TextConfig
from gemma3n_onnx.graphs.embedder import MultimodalEmbedder

from .conversations import QUESTIONS, TALK, Habits, random_row
from .decoder import Sequences, SlicedModel
from .gradient_worker import GradientWorker
from .optimizer import Optimizer, backward
from .pictures import Picture
from .progress import Progress
from .prompts import ConversationEncoder, LabelledSoftTokens
from .sounds import MAX_BEEPS, Sound


@dataclass(frozen=True)
class Phase:
    """Steps under one schedule of learning rates.

    glimpsing: of the steps, so many at the beginning are taken with a few of the soft tokens, which is faster: there is
    time for more. rate: a factor of the learning rates. glimpses, batches: rows of each kind in a step of these and in
    one of the others, and conversations in each row; every process has half of the rows.
    """

    habits: Habits
    steps: int
    glimpsing: int
    rate: float
    glimpses: Mapping[str, tuple[int, int]]
    batches: Mapping[str, tuple[int, int]]


PHASES = (
    Phase(
        QUESTIONS,
        steps=300,
        glimpsing=210,
        rate=1.0,
        glimpses={"text": (22, 4), "picture": (20, 4), "sound": (6, 4), "both": (14, 4)},
        batches={"text": (20, 4), "picture": (6, 8), "sound": (4, 6), "both": (4, 8)},
    ),
    Phase(
        TALK,
        steps=1200,
        glimpsing=960,
        rate=0.7,
        glimpses={"text": (12, 1), "picture": (10, 1), "sound": (6, 1), "both": (18, 1)},
        batches={"text": (12, 1), "picture": (6, 2), "sound": (2, 3), "both": (6, 2)},
    ),
)
PROCESSES = 2
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
    folder: Path,
    seed: int,
    progress: Progress,
) -> None:
    """Trains `weights`, the decoder's by their names in a checkpoint, tables included.

    `table`: the slices that must work; `embedders`: of vision and audio, whose hard tokens the decoder reads; `folder`
    has the tokenizer and the chat template.
    """
    progress.stage("Training the decoder")
    course = partial(Course, config, table, media, hard_rows_of(embedders), folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // PROCESSES))
    with GradientWorker(weights, partial(course, (seed, 1, 1))) as other:
        losses_of = course((seed, 1, 0), weights)
        done = 0
        for number, phase in enumerate(PHASES):
            optimizer = _optimizer(weights, phase)
            for step in range(phase.steps):
                optimizer.clear()
                other.begin(number, step)
                loss = backward(losses_of(number, step)) + other.finish()
                optimizer.update()
                done += 1
                progress.step(done, sum(phase.steps for phase in PHASES), loss)
    torch.set_num_threads(threads)


def _optimizer(weights: Mapping[str, Tensor], phase: Phase) -> Optimizer:
    matrices = [tensor for name, tensor in weights.items() if _is_matrix(name, tensor)]
    others = [tensor for name, tensor in weights.items() if not _is_matrix(name, tensor)]
    return Optimizer(matrices, others, phase.steps, rate=phase.rate, weight_decay=WEIGHT_DECAY)


class Course:
    """What one of the processes is taught: called with the numbers of a phase and of a step in it, the losses of
    conversations that it draws, one for each kind. The losses of all processes add up to means."""

    def __init__(
        self,
        config: TextConfig,
        table: Sequence[SliceSpec],
        media: Media,
        hard_rows: Tensor,
        folder: Path,
        seed: tuple[int, ...],
        weights: Mapping[str, Tensor],
    ) -> None:
        self._config, self._media, self._hard_rows, self._weights = config, media, hard_rows, weights
        self._named = [resolve(spec, config) for spec in table]
        self._models = [SlicedModel(chosen) for chosen in self._named]
        self._encoder = ConversationEncoder(folder)
        self._rng = np.random.default_rng(seed)

    def __call__(self, *step: int) -> Iterator[Tensor]:
        number, of_phase = step
        phase = PHASES[number]
        glimpses = of_phase < phase.glimpsing
        for kind, (rows, each) in (phase.glimpses if glimpses else phase.batches).items():
            model, size = self._model(), (rows // PROCESSES, each)
            batch = random_batch(
                self._rng, kind, size, self._media, self._encoder, habits=phase.habits, glimpses=glimpses
            )
            entropy, lesson = model.losses(self._weights, self._hard_rows, self._encoder.soft_ids, batch)
            yield (entropy + LESSON_WEIGHT * lesson) / PROCESSES

    def _model(self) -> SlicedModel:
        chance = self._rng.random()
        if chance < WHOLE_SHARE:
            return self._models[0]
        if chance < WHOLE_SHARE + NAMED_SHARE:
            return self._models[int(self._rng.integers(1, len(self._models)))]
        return SlicedModel(_random_slice(self._rng, self._config, self._named))


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
    habits: Habits,
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
        row = random_row(rng, seen, heard, size[1], habits)
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
