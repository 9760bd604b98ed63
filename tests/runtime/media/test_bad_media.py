"""Whatever is wrong with an image, a clip or a video is one sentence that names it and says what to do."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest

from bad_media import CASES, POLICY, Case, assert_one_sentence, clip
from gemma3n_onnx.runtime.errors import AudioTooLongError, Gemma3nError, MediaError
from gemma3n_onnx.runtime.media.audio import LogMel, fit, load_audio
from gemma3n_onnx.runtime.media.image import load_image
from gemma3n_onnx.runtime.media.video import sample_frames
from heic import heic
from media import LOG_MEL, RATE_HZ, aac, encoded, photo, tone, video


class Readers:
    def image(self, source: Any) -> None:
        load_image(source, POLICY)

    def audio(self, source: Any, rate: Any = None, **options: Any) -> None:
        samples = load_audio(source, POLICY, RATE_HZ, rate, **options)
        for piece in fit(samples, LOG_MEL):
            LogMel(LOG_MEL)(piece)

    def video(self, source: Any) -> None:
        sample_frames(source, POLICY)


READERS_CASES = [
    *CASES,
    Case(
        "over an hour",
        lambda _, f: Readers().audio(tone(3), RATE_HZ, max_seconds=2),
        AudioTooLongError,
        ("more than", "split"),
    ),
]


@pytest.mark.parametrize("case", READERS_CASES, ids=[case.name for case in READERS_CASES])
def test_one_sentence(case: Case, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Gemma3nError) as raised:
            case.read(Readers(), tmp_path)
    print(f"{raised.type.__name__}: {raised.value}")
    assert raised.type is case.kind
    assert_one_sentence(str(raised.value), case)


KINDS = ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "AVIF", "HEIC", "WAV", "FLAC", "OGG", "m4a", "mp4", "webm"]


@pytest.mark.parametrize("kind", KINDS)
def test_random_damage_is_one_kind_of_error(kind: str, tmp_path: Path) -> None:
    """Either it still reads, or it is a MediaError; nothing else comes out of the libraries."""
    readers = Readers()
    if kind in ("WAV", "FLAC", "OGG"):
        data, read = clip(kind), readers.audio
    elif kind == "m4a":
        data, read = aac(tmp_path / "a.m4a", tone(1)).read_bytes(), readers.audio
    elif kind in ("mp4", "webm"):
        path = video(tmp_path / f"a.{kind}", 1, codec="libvpx" if kind == "webm" else "libx264")
        data, read = path.read_bytes(), readers.video
    elif kind == "HEIC":
        data, read = heic(photo().resize((80, 60)), 32), readers.image
    else:
        data, read = encoded(photo().resize((80, 60)), kind), readers.image
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
