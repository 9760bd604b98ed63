"""What a request's media may take, and how their reading ends early."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from gemma3n_onnx.runtime.errors import DeadlineError, MediaError
from gemma3n_onnx.runtime.media.audio import load_audio
from gemma3n_onnx.runtime.media.budget import UNLIMITED, MediaBudget, MediaCancelledError, MediaLimits
from gemma3n_onnx.runtime.media.fetch import FetchPolicy, open_media
from gemma3n_onnx.runtime.media.image import load_image
from gemma3n_onnx.runtime.media.video import sample_frames
from media import encoded, gradient, sound, tone, video

POLICY = FetchPolicy(allow_private=True)
PICTURE = encoded(Image.fromarray(gradient(40, 30)), "PNG")
SOUND = sound(tone(1.0), 16_000, "WAV")


@contextmanager
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/picture.png"


def test_totals_of_a_request() -> None:
    limits = MediaLimits(sources=3, urls=1, size_bytes=3 * len(PICTURE) - 1, pixels=2 * 1200 - 1)
    with MediaBudget(limits).active():
        load_image(PICTURE, POLICY)
        with pytest.raises(MediaError, match="more than the 2,399 pixels"):
            load_image(PICTURE, POLICY)
        with pytest.raises(MediaError, match=f"more than the {3 * len(PICTURE) - 1:,} bytes of media"):
            load_image(PICTURE, POLICY)
    budget = MediaBudget(limits)
    budget.count([b"", "picture.png", "https://host/a.png"])
    with pytest.raises(MediaError, match="more than the 3 images, clips and videos"):
        budget.count([b""])
    with pytest.raises(MediaError, match="more than the 1 media URLs"):
        MediaBudget(limits).count([" HTTP://host/a.png", "https://host/b.png"])


def test_seconds_and_frames(tmp_path: Path) -> None:
    with MediaBudget(MediaLimits(seconds=1.5)).active():
        load_audio(SOUND, POLICY, 16_000)
        with pytest.raises(MediaError, match=r"more than the 1\.5 seconds of sound and video"):
            load_audio(SOUND, POLICY, 16_000)
    clip = video(tmp_path / "clip.mp4", 2.0)
    with MediaBudget(MediaLimits(frames=3)).active():
        assert len(sample_frames(clip, POLICY)) == 2
        with pytest.raises(MediaError, match="more than the 3 video frames"):
            sample_frames(clip, POLICY)


@pytest.mark.parametrize("read", [load_image, lambda *given: load_audio(*given, 16_000), sample_frames])
def test_nothing_is_read_when_time_is_over(read) -> None:
    with MediaBudget(UNLIMITED, time.monotonic() - 1).active(), pytest.raises(DeadlineError, match="Reading the media"):
        read(PICTURE, POLICY)


def test_the_deadline_of_the_request_holds_for_a_fetch() -> None:
    started = time.monotonic()
    with silent_server() as url, MediaBudget(UNLIMITED, started + 0.2).active(), pytest.raises(DeadlineError):
        open_media(url, POLICY)
    assert time.monotonic() - started < 2


def test_a_fetch_ends_when_it_is_cancelled() -> None:
    budget = MediaBudget()
    threading.Timer(0.1, budget.cancel).start()
    started = time.monotonic()
    with silent_server() as url, budget.active(), pytest.raises(MediaCancelledError):
        open_media(url, POLICY)
    assert time.monotonic() - started < 2


def test_a_name_that_does_not_resolve_ends_when_it_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: ended.wait(5))
    budget = MediaBudget()
    threading.Timer(0.1, budget.cancel).start()
    with budget.active(), pytest.raises(MediaCancelledError):
        open_media("http://a.host/picture.png", POLICY)
    ended.set()
