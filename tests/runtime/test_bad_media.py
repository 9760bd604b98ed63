"""Whatever is wrong with an image, a clip or a video is one sentence that names it and says what to do."""

from __future__ import annotations

import base64
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma3n_onnx.runtime.audio import LogMel, fit, load_audio
from gemma3n_onnx.runtime.errors import (
    AudioTooLongError,
    Gemma3nError,
    MediaError,
    MediaNotFoundError,
    UrlRefusedError,
)
from gemma3n_onnx.runtime.fetch import FetchPolicy
from gemma3n_onnx.runtime.image import load_image
from gemma3n_onnx.runtime.video import sample_frames
from media import LOG_MEL, RATE_HZ, aac, encoded, gradient, noise, photo, sound, tone, video

POLICY = FetchPolicy(timeout_seconds=5, max_bytes=2_000_000)


def as_image(source: Any) -> None:
    load_image(source, POLICY)


def as_audio(source: Any, rate: Any = None, **options: Any) -> None:
    samples = load_audio(source, POLICY, RATE_HZ, rate, **options)
    for clip in fit(samples, LOG_MEL):
        LogMel(LOG_MEL)(clip)


def as_video(source: Any) -> None:
    sample_frames(source, POLICY)


@dataclass(frozen=True)
class Case:
    """`read` is given a folder of its own; `says` are parts of the message."""

    name: str
    read: Callable[[Path], Any]
    kind: type[Gemma3nError]
    says: tuple[str, ...]


def file(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def jpeg() -> bytes:
    return encoded(photo(), "JPEG")


def png() -> bytes:
    return encoded(photo().resize((160, 100)), "PNG")


def declared_png(width: int, height: int) -> bytes:
    """A few bytes that promise a large picture."""
    data = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")):
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return data


def garbled(data: bytes, begin: float, end: float = 1.0, seed: int = 0) -> bytes:
    first, last = int(len(data) * begin), int(len(data) * end)
    return data[:first] + random.Random(seed).randbytes(last - first) + data[last:]


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def clip(format: str, subtype: str | None = None) -> bytes:
    return sound(tone(3), RATE_HZ, format, subtype)


def wav_header(rate: int, data: bytes = b"", codec: int = 1) -> bytes:
    form = struct.pack("<HHIIHH", codec, 1, rate, rate * 2 & 0xFFFFFFFF, 2, 16)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def webm_header(folder: Path, codec: bytes | None = None) -> bytes:
    """A WebM file up to its first cluster of frames, or whole under the name of another codec."""
    data = video(folder / "a.webm", 1, codec="libvpx").read_bytes()
    return data.replace(b"V_VP8", codec[:5]) if codec else data[: data.index(b"\x1fC\xb6u")]


def nan(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flat[7] = np.nan
    return array


NOT_PUBLIC = [
    "http://127.0.0.1/a.png",
    "http://127.0.0.1:8000/a.png",
    "https://[::1]/a.png",
    "http://10.0.0.1/",
    "http://169.254.169.254/latest/meta-data/",
    "http://0.0.0.0/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0177.0.0.1/",
    "http://127.1/",
    "http://localhost/a.png",
    "http://[::ffff:127.0.0.1]/",
    "http://[64:ff9b::a9fe:a9fe]/",
    "http://100.64.0.1/",
]
PICTURE = "data:image/png;base64,"
CASES = [
    Case("truncated JPEG", lambda f: as_image(jpeg()[:20_000]), MediaError, ("damaged or incomplete", "again")),
    Case("truncated PNG", lambda f: as_image(png()[:5_000]), MediaError, ("damaged or incomplete",)),
    Case("truncated GIF", lambda f: as_image(encoded(photo(), "GIF")[:9_000]), MediaError, ("damaged",)),
    Case("truncated WebP", lambda f: as_image(encoded(photo(), "WEBP")[:9_000]), MediaError, ("image",)),
    Case("truncated TIFF", lambda f: as_image(encoded(photo(), "TIFF")[:9_000]), MediaError, ("image",)),
    Case("garbled PNG", lambda f: as_image(garbled(png(), 0.3)), MediaError, ("damaged",)),
    Case("empty image file", lambda f: as_image(file(f, "a.png", b"")), MediaError, ("empty",)),
    Case("text as image", lambda f: as_image(file(f, "a.jpg", b"not an image")), MediaError, ("not an image", "PNG")),
    Case("audio as image", lambda f: as_image(clip("WAV")), MediaError, ("not an image",)),
    Case(
        "PostScript", lambda f: as_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), MediaError, ("not an",)
    ),
    Case("20,000 pixels square", lambda f: as_image(declared_png(20_000, 20_000)), MediaError, ("too many pixels",)),
    Case("12,000 pixels square", lambda f: as_image(declared_png(12_000, 12_000)), MediaError, ("12,000 x 12,000",)),
    Case("bomb", lambda f: as_image(declared_png(50_000, 50_000)), MediaError, ("too many pixels", "100,000,000")),
    Case("one row too wide", lambda f: as_image(declared_png(70_000, 1)), MediaError, ("70,000 x 1", "65,535")),
    Case("bad base64", lambda f: as_image(PICTURE + "@@@@"), MediaError, ("not valid base64",)),
    Case("cut base64", lambda f: as_image("A" * 401), MediaError, ("not valid base64", "complete")),
    Case(
        "base64 of text", lambda f: as_image(base64.b64encode(b"words " * 40).decode()), MediaError, ("not an image",)
    ),
    Case("data URL without comma", lambda f: as_image("data:image/png;base64"), MediaError, ("no comma",)),
    Case("data URL without content", lambda f: as_image(PICTURE), MediaError, ("empty",)),
    Case("large data URL", lambda f: as_image(PICTURE + "A" * 3_000_000), MediaError, ("2,000,000 bytes allowed",)),
    Case("ftp", lambda f: as_image("ftp://example.com/a.png"), UrlRefusedError, ("neither an http nor an https",)),
    Case("file URL", lambda f: as_image("file:///etc/passwd"), UrlRefusedError, ("local path",)),
    Case("gopher", lambda f: as_audio("gopher://example.com/"), UrlRefusedError, ("neither an http",)),
    Case("credentials", lambda f: as_image("http://me:secret@example.com/"), UrlRefusedError, ("without",)),
    Case("bad port", lambda f: as_image("http://example.com:99999/"), MediaError, ("not a valid URL",)),
    Case("no host", lambda f: as_image("http:///a.png"), MediaError, ("not a valid URL",)),
    *(Case(url, lambda f, url=url: as_image(url), UrlRefusedError, ("not a public address",)) for url in NOT_PUBLIC),
    Case("missing image", lambda f: as_image(f / "no.png"), MediaNotFoundError, ("no file", "no.png")),
    Case("missing audio", lambda f: as_audio(str(f / "no.wav")), MediaNotFoundError, ("no file", "no.wav")),
    Case("missing video", lambda f: as_video(str(f / "no.mp4")), MediaNotFoundError, ("no file", "no.mp4")),
    Case("empty string", lambda f: as_image(""), MediaNotFoundError, ("no file",)),
    Case("null in path", lambda f: as_image("a\0.png"), MediaNotFoundError, ("no file",)),
    Case("directory", as_image, MediaError, ("is a directory",)),
    Case("device", lambda f: as_image("/dev/zero"), MediaError, ("not a regular file",)),
    Case("number", lambda f: as_image(7), MediaError, ("int",)),
    Case("image array of one axis", lambda f: as_image(np.zeros(5, np.uint8)), MediaError, ("height x width",)),
    Case("image array of five channels", lambda f: as_image(np.zeros((8, 8, 5), np.uint8)), MediaError, ("8 x 8 x 5",)),
    Case("channels first", lambda f: as_image(np.zeros((3, 9, 9), np.uint8)), MediaError, ("channels first", "transp")),
    Case("image array without rows", lambda f: as_image(np.zeros((0, 5, 3), np.uint8)), MediaError, ("0 x 5 x 3",)),
    Case("image array of int64", lambda f: as_image(np.zeros((5, 5, 3), int)), MediaError, ("int64", "convert")),
    Case("image array with NaN", lambda f: as_image(nan(np.zeros((5, 5)))), MediaError, ("NaN",)),
    Case("image array to 255", lambda f: as_image(gradient(9, 9) * 1.0), MediaError, ("scale floats to 0 to 1",)),
    Case("0.01 s", lambda f: as_audio(tone(0.01), RATE_HZ), MediaError, ("0.010 s", "longer clip")),
    Case("31 s", lambda f: as_audio(noise(31), RATE_HZ), AudioTooLongError, ("31.00 s", 'long_audio="split"')),
    Case("over an hour", lambda f: as_audio(tone(3), RATE_HZ, max_seconds=2), AudioTooLongError, ("more than", "cut")),
    Case("silence", lambda f: as_audio(np.zeros(16_000), RATE_HZ), MediaError, ("silent", "microphone")),
    Case("almost silence", lambda f: as_audio(np.arange(16_000, dtype=np.int16) % 2, RATE_HZ), MediaError, ("silent",)),
    Case("silent file", lambda f: as_audio(sound(np.zeros(9000), 8000, "FLAC")), MediaError, ("silent",)),
    Case("NaN samples", lambda f: as_audio(nan(tone(1)), RATE_HZ), MediaError, ("NaN",)),
    Case("NaN in file", lambda f: as_audio(sound(nan(tone(1)), 16_000, "WAV", "FLOAT")), MediaError, ("NaN",)),
    Case("infinite samples", lambda f: as_audio(np.full(9000, np.inf), RATE_HZ), MediaError, ("infinite",)),
    Case("floats of int16", lambda f: as_audio(tone(1) * 32768, RATE_HZ), MediaError, ("16384", "scale them")),
    Case("three axes", lambda f: as_audio(np.zeros((9, 2, 2)), RATE_HZ), MediaError, ("9 x 2 x 2",)),
    Case("channels x samples", lambda f: as_audio(np.zeros((2, 900)), RATE_HZ), MediaError, ("samples x channels",)),
    Case("complex samples", lambda f: as_audio(np.zeros(900, complex), RATE_HZ), MediaError, ("complex128",)),
    Case("no samples", lambda f: as_audio(np.zeros(0, np.float32), RATE_HZ), MediaError, ("no samples",)),
    Case("no rate", lambda f: as_audio(tone(1)), MediaError, ("sampling rate", "pass rate")),
    *(
        Case(f"rate {rate}", lambda f, rate=rate: as_audio(tone(1), rate), MediaError, ("sampling rate of",))
        for rate in (0, -1, 10**9, 44_100.5, float("nan"), "fast", True)
    ),
    Case("rate of a file", lambda f: as_audio(clip("WAV"), 8000), MediaError, ("leave it out",)),
    Case("pair of three", lambda f: as_audio((tone(1), RATE_HZ, 1)), MediaError, ("(samples, rate)",)),
    Case("empty audio file", lambda f: as_audio(file(f, "a.wav", b"")), MediaError, ("empty",)),
    Case("text as audio", lambda f: as_audio(file(f, "a.mp3", b"words " * 99)), MediaError, ("neither WAV", "M4A")),
    Case("image as audio", lambda f: as_audio(jpeg()), MediaError, ("neither WAV",)),
    Case("WAV of 0 samples", lambda f: as_audio(wav_header(16_000)), MediaError, ("no samples",)),
    Case("WAV header alone", lambda f: as_audio(wav_header(16_000)[:30]), MediaError, ("give another file",)),
    Case("WAV at 10 Hz", lambda f: as_audio(wav_header(10, bytes(900))), MediaError, ("rate of 10 Hz",)),
    Case("WAV of an unknown codec", lambda f: as_audio(wav_header(16_000, bytes(900), 0x9999)), MediaError, ("codec",)),
    Case("garbled FLAC", lambda f: as_audio(garbled(clip("FLAC"), 0.3)), MediaError, ("damaged",)),
    Case("truncated FLAC", lambda f: as_audio(clip("FLAC")[:20_000]), MediaError, ("damaged",)),
    Case("garbled MP3", lambda f: as_audio(garbled(clip("MP3"), 0.3)), MediaError, ("damaged",)),
    Case("truncated MP3", lambda f: as_audio(half(clip("MP3"))), MediaError, ("cut off", "again")),
    Case("garbled Ogg", lambda f: as_audio(garbled(clip("OGG"), 0.01)), MediaError, ("give another file",)),
    Case("garbled Opus", lambda f: as_audio(garbled(clip("OGG", "OPUS"), 0.1)), MediaError, ("give another file",)),
    Case("soundless video", lambda f: as_audio(video(f / "a.mp4", 1)), MediaError, ("no sound",)),
    Case("truncated MP4", lambda f: as_video(video(f / "a.mp4", 3).read_bytes()[:-500]), MediaError, ("not a video",)),
    Case(
        "garbled MP4", lambda f: as_video(garbled(video(f / "a.mp4", 3).read_bytes(), 0, 0.02)), MediaError, ("not a",)
    ),
    Case("sound as video", lambda f: as_video(aac(f / "a.m4a", tone(1))), MediaError, ("only sound", "as audio")),
    Case("WAV as video", lambda f: as_video(clip("WAV")), MediaError, ("only sound",)),
    Case("text as video", lambda f: as_video(file(f, "a.mp4", b"words " * 99)), MediaError, ("not a video",)),
    Case("empty video file", lambda f: as_video(file(f, "a.mp4", b"")), MediaError, ("empty",)),
    Case("video without frames", lambda f: as_video(webm_header(f)), MediaError, ("not a video",)),
    Case(
        "video of an unknown codec", lambda f: as_video(webm_header(f, b"V_NONE")), MediaError, ("codec is not known",)
    ),
    Case("array as video", lambda f: as_video(np.zeros(5)), MediaError, ("ndarray",)),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_one_sentence(case: Case, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Gemma3nError) as raised:
            case.read(tmp_path)
    message = str(raised.value)
    print(f"{raised.type.__name__}: {message}")
    assert raised.type is case.kind
    assert all(part in message for part in case.says)
    assert "\n" not in message and message.endswith(".") and "Traceback" not in message and "secret" not in message
    assert len(message) < 400
    assert ";" in message or "give" in message  # what to do


def test_there_are_enough() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 30


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "WAV", "FLAC", "OGG", "m4a", "mp4", "webm"])
def test_random_damage_is_one_kind_of_error(kind: str, tmp_path: Path) -> None:
    """Either it still reads, or it is a MediaError; nothing else comes out of the libraries."""
    if kind in ("WAV", "FLAC", "OGG"):
        data, read = clip(kind), as_audio
    elif kind == "m4a":
        data, read = aac(tmp_path / "a.m4a", tone(1)).read_bytes(), as_audio
    elif kind in ("mp4", "webm"):
        path = video(tmp_path / f"a.{kind}", 1, codec="libvpx" if kind == "webm" else "libx264")
        data, read = path.read_bytes(), as_video
    else:
        data, read = encoded(photo().resize((80, 60)), kind), as_image
    chance = random.Random(kind)
    failed = 0
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(chance.choice((1, 3, 30))):
            damaged[int(len(data) * chance.random() ** 2)] = chance.randrange(256)
        end = chance.choice((len(data), chance.randrange(1, len(data))))
        try:
            read(bytes(damaged[:end]))
        except MediaError:
            failed += 1
    print(f"{kind}: {failed} of 60 damaged files refused")
