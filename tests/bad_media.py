"""Images, clips and videos that cannot be read, and what is to be said of each."""

from __future__ import annotations

import base64
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gemma3n_onnx.runtime.errors import (
    AudioTooLongError,
    Gemma3nError,
    MediaError,
    MediaNotFoundError,
    UrlRefusedError,
)
from gemma3n_onnx.runtime.media.fetch import FetchPolicy
from heic import heic
from media import RATE_HZ, aac, encoded, gradient, noise, photo, sound, tone, video

POLICY = FetchPolicy(timeout_seconds=5, max_bytes=2_000_000)


class Reader(Protocol):
    """What is given the bad media: the readers themselves, or a model."""

    def image(self, source: Any) -> Any: ...
    def audio(self, source: Any, rate: Any = None) -> Any: ...
    def video(self, source: Any) -> Any: ...


@dataclass(frozen=True)
class Case:
    """`read` is given a folder of its own; `says` are parts of the message."""

    name: str
    read: Callable[[Reader, Path], Any]
    kind: type[Gemma3nError]
    says: tuple[str, ...]


def file(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def jpeg() -> bytes:
    return encoded(photo(), "JPEG")


def jpeg_header() -> bytes:
    """A JPEG up to its picture."""
    data = jpeg()
    scan = data.index(b"\xff\xda") + 2
    return data[: scan + int.from_bytes(data[scan : scan + 2], "big")]


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
PDF = b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n"
CASES = [
    Case("JPEG without a picture", lambda r, f: r.image(jpeg_header()), MediaError, ("damaged or incomplete", "again")),
    Case("JPEG without tables", lambda r, f: r.image(jpeg()[:40]), MediaError, ("damaged or incomplete",)),
    Case("truncated AVIF", lambda r, f: r.image(encoded(photo(), "AVIF")[:9_000]), MediaError, ("image",)),
    Case("truncated HEIC", lambda r, f: r.image(heic(photo().resize((64, 48)))[:-50]), MediaError, ("damaged",)),
    Case("garbled HEIC", lambda r, f: r.image(garbled(heic(photo()), 0.0, 0.005)[20:]), MediaError, ("not an",)),
    Case("PDF as image", lambda r, f: r.image(PDF), MediaError, ("This is a PDF", "each page as an image")),
    Case("PDF as audio", lambda r, f: r.audio(PDF), MediaError, ("This is a PDF",)),
    Case("PDF as video", lambda r, f: r.video(file(f, "a.mp4", PDF)), MediaError, ("This is a PDF",)),
    Case("truncated PNG", lambda r, f: r.image(png()[:5_000]), MediaError, ("damaged or incomplete",)),
    Case("truncated GIF", lambda r, f: r.image(encoded(photo(), "GIF")[:9_000]), MediaError, ("damaged",)),
    Case("truncated WebP", lambda r, f: r.image(encoded(photo(), "WEBP")[:9_000]), MediaError, ("image",)),
    Case("truncated TIFF", lambda r, f: r.image(encoded(photo(), "TIFF")[:9_000]), MediaError, ("image",)),
    Case("garbled PNG", lambda r, f: r.image(garbled(png(), 0.3)), MediaError, ("damaged",)),
    Case("empty image file", lambda r, f: r.image(file(f, "a.png", b"")), MediaError, ("empty",)),
    Case("text as image", lambda r, f: r.image(file(f, "a.jpg", b"not an image")), MediaError, ("not an image", "PNG")),
    Case("audio as image", lambda r, f: r.image(clip("WAV")), MediaError, ("not an image",)),
    Case(
        "PostScript",
        lambda r, f: r.image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        MediaError,
        ("not an",),
    ),
    Case("20,000 pixels square", lambda r, f: r.image(declared_png(20_000, 20_000)), MediaError, ("too many pixels",)),
    Case("12,000 pixels square", lambda r, f: r.image(declared_png(12_000, 12_000)), MediaError, ("12,000 x 12,000",)),
    Case("bomb", lambda r, f: r.image(declared_png(50_000, 50_000)), MediaError, ("too many pixels", "100,000,000")),
    Case("one row too wide", lambda r, f: r.image(declared_png(70_000, 1)), MediaError, ("70,000 x 1", "65,535")),
    Case("bad base64", lambda r, f: r.image(PICTURE + "@@@@"), MediaError, ("not valid base64",)),
    Case("cut base64", lambda r, f: r.image("A" * 401), MediaError, ("not valid base64", "complete")),
    Case(
        "base64 of text", lambda r, f: r.image(base64.b64encode(b"words " * 40).decode()), MediaError, ("not an image",)
    ),
    Case("data URL without comma", lambda r, f: r.image("data:image/png;base64"), MediaError, ("no comma",)),
    Case("data URL without content", lambda r, f: r.image(PICTURE), MediaError, ("empty",)),
    Case("large data URL", lambda r, f: r.image(PICTURE + "A" * 3_000_000), MediaError, ("2,000,000 bytes allowed",)),
    Case("ftp", lambda r, f: r.image("ftp://example.com/a.png"), UrlRefusedError, ("neither an http nor an https",)),
    Case("file URL", lambda r, f: r.image("file:///etc/passwd"), UrlRefusedError, ("local path",)),
    Case("gopher", lambda r, f: r.audio("gopher://example.com/"), UrlRefusedError, ("neither an http",)),
    Case("credentials", lambda r, f: r.image("http://me:secret@example.com/"), UrlRefusedError, ("without",)),
    Case("bad port", lambda r, f: r.image("http://example.com:99999/"), MediaError, ("not a valid URL",)),
    Case("no host", lambda r, f: r.image("http:///a.png"), MediaError, ("not a valid URL",)),
    *(Case(url, lambda r, f, url=url: r.image(url), UrlRefusedError, ("not a public address",)) for url in NOT_PUBLIC),
    Case("missing image", lambda r, f: r.image(f / "no.png"), MediaNotFoundError, ("no file", "no.png")),
    Case("missing audio", lambda r, f: r.audio(str(f / "no.wav")), MediaNotFoundError, ("no file", "no.wav")),
    Case("missing video", lambda r, f: r.video(str(f / "no.mp4")), MediaNotFoundError, ("no file", "no.mp4")),
    Case("empty string", lambda r, f: r.image(""), MediaNotFoundError, ("no file",)),
    Case("null in path", lambda r, f: r.image("a\0.png"), MediaNotFoundError, ("no file",)),
    Case("directory", lambda r, f: r.image(f), MediaError, ("is a directory",)),
    Case("device", lambda r, f: r.image("/dev/zero"), MediaError, ("not a regular file",)),
    Case("number", lambda r, f: r.image(7), MediaError, ("int",)),
    Case("image array of one axis", lambda r, f: r.image(np.zeros(5, np.uint8)), MediaError, ("height x width",)),
    Case(
        "image array of five channels", lambda r, f: r.image(np.zeros((8, 8, 5), np.uint8)), MediaError, ("8 x 8 x 5",)
    ),
    Case(
        "channels first", lambda r, f: r.image(np.zeros((3, 9, 9), np.uint8)), MediaError, ("channels first", "transp")
    ),
    Case("image array without rows", lambda r, f: r.image(np.zeros((0, 5, 3), np.uint8)), MediaError, ("0 x 5 x 3",)),
    Case("image array of int64", lambda r, f: r.image(np.zeros((5, 5, 3), int)), MediaError, ("int64", "convert")),
    Case("image array with NaN", lambda r, f: r.image(nan(np.zeros((5, 5)))), MediaError, ("NaN",)),
    Case("image array to 255", lambda r, f: r.image(gradient(9, 9) * 1.0), MediaError, ("scale floats to 0 to 1",)),
    Case("0.01 s", lambda r, f: r.audio(tone(0.01), RATE_HZ), MediaError, ("0.010 s", "longer clip")),
    Case("31 s", lambda r, f: r.audio(noise(31), RATE_HZ), AudioTooLongError, ("31.00 s", 'long_audio="split"')),
    Case("silence", lambda r, f: r.audio(np.zeros(16_000), RATE_HZ), MediaError, ("silent", "microphone")),
    Case(
        "almost silence", lambda r, f: r.audio(np.arange(16_000, dtype=np.int16) % 2, RATE_HZ), MediaError, ("silent",)
    ),
    Case("silent file", lambda r, f: r.audio(sound(np.zeros(9000), 8000, "FLAC")), MediaError, ("silent",)),
    Case("NaN samples", lambda r, f: r.audio(nan(tone(1)), RATE_HZ), MediaError, ("NaN",)),
    Case("NaN in file", lambda r, f: r.audio(sound(nan(tone(1)), 16_000, "WAV", "FLOAT")), MediaError, ("NaN",)),
    Case("infinite samples", lambda r, f: r.audio(np.full(9000, np.inf), RATE_HZ), MediaError, ("infinite",)),
    Case("floats of int16", lambda r, f: r.audio(tone(1) * 32768, RATE_HZ), MediaError, ("16384", "scale them")),
    Case("three axes", lambda r, f: r.audio(np.zeros((9, 2, 2)), RATE_HZ), MediaError, ("9 x 2 x 2",)),
    Case("channels x samples", lambda r, f: r.audio(np.zeros((2, 900)), RATE_HZ), MediaError, ("samples x channels",)),
    Case("complex samples", lambda r, f: r.audio(np.zeros(900, complex), RATE_HZ), MediaError, ("complex128",)),
    Case("no samples", lambda r, f: r.audio(np.zeros(0, np.float32), RATE_HZ), MediaError, ("no samples",)),
    Case("no rate", lambda r, f: r.audio(tone(1)), MediaError, ("sampling rate", "pass rate")),
    *(
        Case(f"rate {rate}", lambda r, f, rate=rate: r.audio(tone(1), rate), MediaError, ("sampling rate of",))
        for rate in (0, -1, 10**9, 44_100.5, float("nan"), "fast", True)
    ),
    Case("rate of a file", lambda r, f: r.audio(clip("WAV"), 8000), MediaError, ("leave it out",)),
    Case("pair of three", lambda r, f: r.audio((tone(1), RATE_HZ, 1)), MediaError, ("(samples, rate)",)),
    Case("empty audio file", lambda r, f: r.audio(file(f, "a.wav", b"")), MediaError, ("empty",)),
    Case("text as audio", lambda r, f: r.audio(file(f, "a.mp3", b"words " * 99)), MediaError, ("neither WAV", "M4A")),
    Case("image as audio", lambda r, f: r.audio(jpeg()), MediaError, ("neither WAV",)),
    Case("WAV of 0 samples", lambda r, f: r.audio(wav_header(16_000)), MediaError, ("no samples",)),
    Case("WAV header alone", lambda r, f: r.audio(wav_header(16_000)[:30]), MediaError, ("give another file",)),
    Case("WAV at 10 Hz", lambda r, f: r.audio(wav_header(10, bytes(900))), MediaError, ("rate of 10 Hz",)),
    Case(
        "WAV of an unknown codec", lambda r, f: r.audio(wav_header(16_000, bytes(900), 0x9999)), MediaError, ("codec",)
    ),
    Case("garbled FLAC", lambda r, f: r.audio(garbled(clip("FLAC"), 0.3)), MediaError, ("damaged",)),
    Case("truncated FLAC", lambda r, f: r.audio(clip("FLAC")[:20_000]), MediaError, ("damaged",)),
    Case("garbled MP3", lambda r, f: r.audio(garbled(clip("MP3"), 0.3)), MediaError, ("damaged",)),
    Case("truncated MP3", lambda r, f: r.audio(half(clip("MP3"))), MediaError, ("cut off", "again")),
    Case("garbled Ogg", lambda r, f: r.audio(garbled(clip("OGG"), 0.01)), MediaError, ("give another file",)),
    Case("garbled Opus", lambda r, f: r.audio(garbled(clip("OGG", "OPUS"), 0.1)), MediaError, ("give another file",)),
    Case("soundless video", lambda r, f: r.audio(video(f / "a.mp4", 1)), MediaError, ("no audio stream",)),
    Case(
        "truncated MP4", lambda r, f: r.video(video(f / "a.mp4", 3).read_bytes()[:-500]), MediaError, ("not a video",)
    ),
    Case(
        "garbled MP4",
        lambda r, f: r.video(garbled(video(f / "a.mp4", 3).read_bytes(), 0, 0.02)),
        MediaError,
        ("not a",),
    ),
    Case("sound as video", lambda r, f: r.video(aac(f / "a.m4a", tone(1))), MediaError, ("only audio", "as audio")),
    Case("WAV as video", lambda r, f: r.video(clip("WAV")), MediaError, ("only audio",)),
    Case("text as video", lambda r, f: r.video(file(f, "a.mp4", b"words " * 99)), MediaError, ("not a video",)),
    Case("empty video file", lambda r, f: r.video(file(f, "a.mp4", b"")), MediaError, ("empty",)),
    Case("video without frames", lambda r, f: r.video(webm_header(f)), MediaError, ("not a video",)),
    Case(
        "video of an unknown codec",
        lambda r, f: r.video(webm_header(f, b"V_NONE")),
        MediaError,
        ("codec is not known",),
    ),
    Case("array as video", lambda r, f: r.video(np.zeros(5)), MediaError, ("ndarray",)),
]


def assert_one_sentence(message: str, case: Case) -> None:
    """What is wrong and what to do about it."""
    assert all(part in message for part in case.says)
    assert "\n" not in message and message.endswith(".") and "Traceback" not in message and "secret" not in message
    assert len(message) < 400
    assert ";" in message or "give" in message
