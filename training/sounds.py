"""Sounds of the demo's world: one long tone, steady, rising or falling, or a few beeps, and how they are made."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RATE_HZ = 16_000
KINDS = ("high", "low", "rising", "falling")
MAX_BEEPS = 4
HIGH_HZ = (1100.0, 2600.0)
LOW_HZ = (170.0, 420.0)
SWEEP_HZ = (200.0, 2600.0)
_FADE_SECONDS = 0.012


@dataclass(frozen=True)
class Sound:
    """`beeps` is 0 for one long tone, which may be of any kind; beeps are high or low. `seed`: of all the rest."""

    kind: str
    beeps: int
    seed: int

    def synthesize(self) -> tuple[np.ndarray, list[tuple[float, float]]]:
        """Samples [n] fp32 at 16 kHz, and from when to when in seconds each tone sounds."""
        rng = np.random.default_rng(self.seed)
        if self.beeps:
            length, gap = rng.uniform(0.2, 0.32), rng.uniform(0.3, 0.5)
            lengths, gaps = [length] * self.beeps, [gap] * (self.beeps - 1)
        else:
            lengths, gaps = [rng.uniform(0.8, 2.5)], []
        start = rng.uniform(0.1, 0.8)
        spans = []
        for length, gap in zip(lengths, [*gaps, 0.0]):
            spans.append((start, start + length))
            start += length + gap
        samples = np.zeros(round((spans[-1][1] + rng.uniform(0.15, 0.8)) * RATE_HZ), np.float32)
        pitches, harmonics, loudness = _pitches(rng, self.kind), _harmonics(rng), np.exp(rng.uniform(-2.3, -0.4))
        for begin, end in spans:
            tone = loudness * _tone(pitches, end - begin, harmonics)
            first = round(begin * RATE_HZ)
            samples[first : first + len(tone)] += tone
        noise = loudness * np.exp(rng.uniform(-7, -3.2))
        return samples + noise * rng.standard_normal(len(samples), dtype=np.float32), spans


def random_sound(rng: np.random.Generator) -> Sound:
    beeps = int(rng.integers(1, MAX_BEEPS + 1)) if rng.random() < 0.5 else 0
    kind = str(rng.choice(KINDS[:2] if beeps else KINDS))
    return Sound(kind, beeps, int(rng.integers(1 << 31)))


def _pitches(rng: np.random.Generator, kind: str) -> tuple[float, float]:
    """Frequency in Hz at the beginning and at the end."""
    if kind in ("high", "low"):
        pitch = float(np.exp(rng.uniform(*np.log(HIGH_HZ if kind == "high" else LOW_HZ))))
        return pitch, pitch
    ratio = rng.uniform(2.0, 5.0)
    lower = float(np.exp(rng.uniform(np.log(SWEEP_HZ[0]), np.log(SWEEP_HZ[1] / ratio))))
    return (lower, lower * ratio) if kind == "rising" else (lower * ratio, lower)


def _harmonics(rng: np.random.Generator) -> np.ndarray:
    """Amplitudes of the overtones, the tone itself first; they sum to 1."""
    amplitudes = np.array([1.0, *(rng.uniform(0, 0.5, 3) / np.arange(2, 5))])
    if rng.random() < 0.4:
        amplitudes[1:] = 0
    return amplitudes / amplitudes.sum()


def _tone(pitches: tuple[float, float], seconds: float, harmonics: np.ndarray) -> np.ndarray:
    """A tone that glides evenly on the musical scale, faded in and out."""
    count = round(seconds * RATE_HZ)
    pitch = np.geomspace(*pitches, count)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE_HZ
    wave = sum(amplitude * np.sin(n * phase) for n, amplitude in enumerate(harmonics, start=1))
    ramp = np.minimum(np.arange(count), np.arange(count)[::-1]) / (_FADE_SECONDS * RATE_HZ)
    return (wave * np.minimum(ramp, 1)).astype(np.float32)
