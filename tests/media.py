"""Sounds, pictures and videos made for the tests, and the one photograph that scikit-learn brings."""

from __future__ import annotations

import ctypes
import functools
import io
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from gemma3n_onnx.runtime.artifact import LogMelInfo

RATE_HZ = 16_000
# What the published checkpoints' feature extractor is set to.
LOG_MEL = LogMelInfo(
    sample_rate_hz=RATE_HZ,
    frame_length=512,
    hop_length=160,
    fft_length=1024,
    mel_bins=128,
    min_frequency_hz=125.0,
    max_frequency_hz=7600.0,
    preemphasis=0.97,
    mel_floor=1e-5,
    max_samples=480_000,
    pad_multiple=128,
)


def photo(name: str = "china.jpg") -> Image.Image:
    """A photograph, 640 x 427 RGB: "china.jpg" or "flower.jpg" of scikit-learn's samples."""
    import sklearn.datasets

    return Image.open(Path(sklearn.datasets.__file__).parent / "images" / name).convert("RGB")


def gradient(width: int, height: int, channels: int = 3) -> np.ndarray:
    """[height, width, channels] uint8 with detail at every scale, different in each channel."""
    y, x = np.mgrid[:height, :width]
    return np.stack([(x * (3 + c) + y * (5 - c) + x * y // 7) % 256 for c in range(channels)], axis=-1).astype(np.uint8)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def tone(seconds: float, hertz: float = 440.0, rate: int = RATE_HZ, peak: float = 0.5) -> np.ndarray:
    """[n] fp32"""
    return (peak * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def chirp(seconds: float, start_hz: float, end_hz: float, rate: int = RATE_HZ) -> np.ndarray:
    """[n] fp32, from one frequency to another in a straight line."""
    t = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (start_hz + (end_hz - start_hz) * t / (2 * seconds)) * t)).astype(np.float32)


def noise(seconds: float, rate: int = RATE_HZ, seed: int = 0) -> np.ndarray:
    """[n] fp32"""
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate))).astype(np.float32)


def speech(text: str, rate: int = RATE_HZ) -> tuple[np.ndarray, int]:
    """`text` spoken in English by eSpeak NG: samples [n] fp32 at `rate`, and that rate."""
    import soxr

    library, spoken_hz = _espeak()
    spoken: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def take(samples: ctypes._Pointer[ctypes.c_short], count: int, _: int | None) -> int:
        if samples and count:
            spoken.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(take)
    data = text.encode() + b"\0"
    utf8, by_character = 1, 1
    assert library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, by_character, 0, utf8, None, None) == 0
    library.espeak_Synchronize()
    samples = np.concatenate(spoken).astype(np.float32) / 32768
    return soxr.resample(samples, spoken_hz, rate), rate


@functools.cache
def _espeak() -> tuple[ctypes.CDLL, int]:
    """eSpeak NG and its rate in Hz. It is initialised once in a process."""
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    synchronous = 2
    rate = library.espeak_Initialize(synchronous, 0, str(espeakng_loader.get_data_path()).encode(), 0)
    assert rate > 0 and library.espeak_SetVoiceByName(b"en") == 0
    return library, rate


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE_HZ) -> Path:
    """[n] or [n, channels] floats -> 16-bit PCM."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return path


def sound(samples: np.ndarray, rate: int, format: str, subtype: str | None = None) -> bytes:
    """[n] or [n, channels] floats as a file of one of libsndfile's formats."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def aac(path: Path, samples: np.ndarray, rate: int = RATE_HZ) -> Path:
    """[n] floats as AAC (or, for .webm, Opus) in the container that the path's suffix names."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libopus" if path.suffix == ".webm" else "aac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), format="fltp", layout="mono")
        frame.rate = rate
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    return path


def numbered(index: int, width: int = 64, height: int = 48) -> np.ndarray:
    """A frame [height, width, 3] uint8 of one grey: 8 times its number, modulo 256."""
    return np.full((height, width, 3), index * 8 % 256, np.uint8)


def video(
    path: Path,
    seconds: float,
    fps: int = 10,
    codec: str = "libx264",
    draw: Callable[[int], np.ndarray] = numbered,
    times: list[float] | None = None,
    key_every: int = 12,
) -> Path:
    """Frames drawn by their number, at even times, or at `times` (seconds): a variable frame rate."""
    from fractions import Fraction

    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        first = draw(0)
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.gop_size = key_every
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(len(times) if times is not None else round(seconds * fps)):
            frame = av.VideoFrame.from_ndarray(draw(index), "rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[index] * 1000), Fraction(1, 1000)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
