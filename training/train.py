"""Trains the demo checkpoint from nothing: `python -m gemma3n_onnx.training.train demo`."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from gemma3n_onnx.export.slicing import load_slices
from gemma3n_onnx.export.text_weights import tensor_shapes
from gemma3n_onnx.graphs.audio import AudioConfig
from gemma3n_onnx.graphs.config import TextConfig
from gemma3n_onnx.graphs.vision import OUTPUT_SIDE, VisionConfig
from gemma3n_onnx.runtime.cli.exit import exit_with_message

from .audio import clip_set, train_audio
from .checkpoint import LOG_MEL, demo_config, write_companions, write_weights
from .decoder import TOKENS, initial_weights
from .pictures import Picture
from .progress import Progress
from .prompts import ConversationEncoder
from .text import Media, train_decoder
from .vision import picture_set, train_vision
from .words import WordClassifier

PICTURES, CLIPS = 2000, 3000
# mallopt: never return memory to the system, nor map large blocks by themselves. A step frees gigabytes that the
# next one asks for again, and a fresh page costs more than the arithmetic on it.
_MALLOC_OPTIONS = {-4: 0, -1: 2**31 - 1, -2: 64 * 2**20}


def train(output: Path, seed: int) -> None:
    """Writes config, tokenizer and weights to the folder `output`; what else it holds stays.

    Equal seeds give equal weights on one machine with as many threads.
    """
    _keep_freed_memory()
    progress = Progress()
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    config = demo_config()
    text_config = TextConfig.from_hf(config)
    with resources.as_file(resources.files("gemma3n_onnx.demo") / "slices.csv") as path:
        table = load_slices(path).specs
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as partial_folder:
        folder = Path(partial_folder)
        write_companions(folder, config)
        encoder = ConversationEncoder(folder)
        weights = initial_weights(tensor_shapes(text_config), text_config, rng)
        words = partial(WordClassifier, embeddings=weights[TOKENS], encoder=encoder, rng=rng)

        progress.stage("Drawing pictures")
        pictures = picture_set(seed, PICTURES)
        vision, picture_features = train_vision(VisionConfig.from_hf(config), pictures, words, rng, progress)
        progress.stage("Making sounds")
        clips = clip_set(seed, CLIPS, LOG_MEL)
        audio, sound_features = train_audio(AudioConfig.from_hf(config), clips, words, rng, progress)

        media = Media(
            pictures.pictures,
            picture_features,
            torch.stack([_shows(picture) for picture in pictures.pictures]),
            [clip.sound for clip in clips],
            sound_features,
            _padded([(clip.kind != 0).long() for clip in clips], sound_features.shape[1]),
            _padded([clip.count for clip in clips], sound_features.shape[1]),
        )
        embedders = vision.embed_vision, audio.embed_audio
        train_decoder(weights, text_config, table, media, embedders, folder, seed, progress)
        progress.stage("Writing the checkpoint")
        write_weights(folder, config, weights, {**vision.state_dict(), **audio.state_dict()})
        for path in sorted(folder.iterdir()):
            os.replace(path, output / path.name)


def _shows(picture: Picture) -> Tensor:
    """int64 [256], the thing in each cell as a bit."""
    return (1 << torch.from_numpy(picture.surrounds(OUTPUT_SIDE)).long().flatten()) >> 1


def _padded(rows: Sequence[Tensor], length: int) -> Tensor:
    return torch.stack([F.pad(row, (0, length - len(row))) for row in rows])


def _keep_freed_memory() -> None:
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for option, value in _MALLOC_OPTIONS.items():
            mallopt(option, value)


@click.command()
@click.argument("output", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
def command(output: Path, seed: int) -> None:
    """Train the demo checkpoint and write it to the folder OUTPUT."""
    train(output, seed)


if __name__ == "__main__":
    exit_with_message(partial(command.main, prog_name="train", standalone_mode=False))
