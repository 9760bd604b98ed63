"""Trains the reduced audio encoder to say of every 160 ms of a clip what sounds there."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma3n_onnx.graphs.audio import AudioConfig, AudioEncoder
from gemma3n_onnx.runtime.artifact import LogMelInfo
from gemma3n_onnx.runtime.audio import LogMel

from .optimizer import Optimizer
from .progress import Progress
from .sounds import KINDS, Sound, random_sound
from .words import Words

TOKEN_SECONDS = 0.16
KIND_NAMES = (None, *KINDS)
MIDDLE_NAMES = (None, "beep")
CHUNK = 250
STEPS, BATCH = 300, 32
_HARD = ("embed_audio.embedding.", "embed_audio.hard_embedding_norm.")


@dataclass(frozen=True)
class Clip:
    """`features` [T, mel bins] fp32 and `mask` [T] as the front end gives them; for each token, int64: `kind`, 0 for
    silence, and `middle`, 1 where the middle of a beep lies."""

    sound: Sound
    features: Tensor
    mask: Tensor
    kind: Tensor
    middle: Tensor


def clip_set(seed: int, count: int, log_mel: LogMelInfo) -> list[Clip]:
    """`count` random sounds, rounded up to a multiple of `CHUNK`; equal arguments, equal sounds."""
    with ProcessPoolExecutor(2) as pool:
        chunks = pool.map(_chunk, [(seed, number, log_mel) for number in range(-(-count // CHUNK))])
        parts = [part for chunk in chunks for part in chunk]
    return [Clip(sound, *map(torch.from_numpy, arrays)) for sound, *arrays in parts]


def _chunk(arguments: tuple[int, int, LogMelInfo]) -> list[tuple]:
    *seed, info = arguments
    rng, log_mel = np.random.default_rng(seed), LogMel(info)
    chunk = []
    for _ in range(CHUNK):
        sound = random_sound(rng)
        samples, spans = sound.synthesize()
        features, mask = log_mel(samples)
        tokens = -(-len(features) // 16)
        kind, middle = np.zeros(tokens, np.int64), np.zeros(tokens, np.int64)
        times = (np.arange(tokens) + 0.5) * TOKEN_SECONDS
        for begin, end in spans:
            half = min(int((begin + end) / 2 / TOKEN_SECONDS), tokens - 1)
            kind[(times > begin) & (times < end)] = kind[half] = 1 + KINDS.index(sound.kind)
            middle[half] = bool(sound.beeps)
        chunk.append((sound, features, mask, kind, middle))
    return chunk


def train_audio(
    config: AudioConfig, clips: Sequence[Clip], words: Words, rng: torch.Generator, progress: Progress
) -> tuple[AudioEncoder, Tensor]:
    """An encoder of `config`, and the clips' soft tokens [n, 188, H] fp16, each clip encoded alone as the runtime does.

    `words(names)` makes a classifier of soft tokens. The embedder's rows of hard tokens stay as they begin.
    """
    progress.stage("Training the audio encoder")
    encoder = AudioEncoder(config)
    _initialize(encoder, rng)
    kind, middle = words(KIND_NAMES), words(MIDDLE_NAMES)
    learned = [parameter for name, parameter in encoder.named_parameters() if not name.startswith(_HARD)]
    optimizer = Optimizer([], learned, STEPS)
    for step in range(STEPS):
        chosen = [clips[i] for i in torch.randint(len(clips), (BATCH,), generator=rng).tolist()]
        tokens = encoder(*_padded(chosen))
        loss = F.cross_entropy(kind(tokens), _labels(chosen, "kind", config), ignore_index=-1) + F.cross_entropy(
            middle(tokens), _labels(chosen, "middle", config), ignore_index=-1
        )
        progress.step(step + 1, STEPS, optimizer.step([loss]))
    encoder.requires_grad_(False)
    progress.stage("Encoding the sounds")
    return encoder, torch.stack([encoder(clip.features[None], clip.mask[None]).half() for clip in clips])


@torch.no_grad()
def _initialize(encoder: AudioEncoder, rng: torch.Generator) -> None:
    for name, parameter in encoder.named_parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=rng) / parameter[0].numel() ** 0.5)
        elif name.endswith((".bias", "per_dim_scale")):
            parameter.zero_()
        else:
            parameter.fill_(1.0)


def _padded(clips: Sequence[Clip]) -> tuple[Tensor, Tensor]:
    features = nn.utils.rnn.pad_sequence([clip.features for clip in clips], batch_first=True)
    return features, nn.utils.rnn.pad_sequence([clip.mask for clip in clips], batch_first=True)


def _labels(clips: Sequence[Clip], name: str, config: AudioConfig) -> Tensor:
    """[n * soft tokens], -1 behind a clip's end."""
    rows = [F.pad(getattr(clip, name), (0, config.soft_tokens - len(clip.kind)), value=-1) for clip in clips]
    return torch.cat(rows)
