"""Trains the reduced audio encoder to say of every 160 ms of a clip what sounds there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma3n_onnx.graphs.audio import AudioConfig, AudioEncoder
from gemma3n_onnx.runtime.artifact import LogMelInfo
from gemma3n_onnx.runtime.media.audio import LogMel

from .optimizer import Optimizer, split
from .progress import Progress
from .sounds import KINDS, Sound, random_sound
from .words import Words
from .workers import in_processes

TOKEN_SECONDS = 0.16
LATENCY_SECONDS = 0.05
"""A token tells what sounded so long before its own time: the encoder never looks ahead."""
UNCERTAIN_SECONDS = 0.02
"""Nothing is taught of tokens so near to where a sound begins or ends."""
KIND_NAMES = (None, *KINDS)
ONSET_NAMES = (None, "beep")
CHUNK = 250
STEPS, BATCH = 300, 32
MUON_LR = 3e-2
ONSET_WEIGHT = 3.0


@dataclass(frozen=True)
class Clip:
    """`features` [T, mel bins] fp32 and `mask` [T] as the front end gives them; for each token, int64: `kind`, 0 for
    silence, `onset`, 1 in the first that hears a beep, both -1 where it is uncertain, and `count`, the number of the
    beep that is first heard, else 0."""

    sound: Sound
    features: Tensor
    mask: Tensor
    kind: Tensor
    onset: Tensor
    count: Tensor


def clip_set(seed: int, count: int, log_mel: LogMelInfo) -> list[Clip]:
    """`count` random sounds, rounded up to a multiple of `CHUNK`; equal arguments, equal sounds."""
    chunks = in_processes(_chunk, [(seed, number, log_mel) for number in range(-(-count // CHUNK))])
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
        kind, onset, count = (np.zeros(tokens, np.int64) for _ in range(3))
        times = np.arange(tokens) * TOKEN_SECONDS - LATENCY_SECONDS
        for number, (begin, end) in enumerate(spans, start=1):
            sounding = (times >= begin) & (times < end)
            kind[sounding] = 1 + KINDS.index(sound.kind)
            if sound.beeps:
                first = sounding.argmax()
                onset[first], count[first] = 1, number
            for i in np.flatnonzero(np.abs(times - begin) < UNCERTAIN_SECONDS):
                kind[i] = onset[i] = onset[i + 1] = -1
            kind[np.abs(times - end) < UNCERTAIN_SECONDS] = -1
        chunk.append((sound, features, mask, kind, onset, count))
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
    kind, onset = words(KIND_NAMES), words(ONSET_NAMES)
    encoder.embed_audio.embedding.requires_grad_(False)
    encoder.embed_audio.hard_embedding_norm.requires_grad_(False)
    optimizer = Optimizer(*split(encoder), STEPS, muon_lr=MUON_LR)
    for step in range(STEPS):
        chosen = [clips[i] for i in torch.randint(len(clips), (BATCH,), generator=rng).tolist()]
        tokens = encoder(*_padded(chosen))
        kinds, onsets = (_labels(chosen, name, config) for name in ("kind", "onset"))
        loss = F.cross_entropy(kind(tokens), kinds, ignore_index=-1)
        loss = loss + F.cross_entropy(onset(tokens), onsets, torch.tensor([1.0, ONSET_WEIGHT]), ignore_index=-1)
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
