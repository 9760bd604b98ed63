"""The frames that a player would show at even times."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gemma3n_onnx.runtime.errors import MediaError, OptionError, PackageMissingError
from gemma3n_onnx.runtime.media import video as module
from gemma3n_onnx.runtime.media.fetch import FetchPolicy
from gemma3n_onnx.runtime.media.image import resize, to_pixels
from gemma3n_onnx.runtime.media.video import Frame, sample_frames
from media import aac, gradient, tone, video

POLICY = FetchPolicy()


def numbers(frames: list[Frame]) -> list[int]:
    """Which of `media.numbered`'s frames these are, of the first 32."""
    return [round(float(np.asarray(frame.image).mean()) / 8) for frame in frames]


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mov", "mpeg4"),
        ("a.mkv", "libx264"),
        ("a.webm", "libvpx-vp9"),
        ("a.avi", "mpeg4"),
        ("a.ts", "libx264"),
        ("a.mpg", "mpeg2video"),
        ("a.ogv", "libtheora"),
        ("a.gif", "gif"),
        ("a.h264", "libx264"),
    ],
)
def test_containers(name: str, codec: str, tmp_path: Path) -> None:
    import av

    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    path = video(tmp_path / name, 3.0, fps=25, codec=codec)
    frames = sample_frames(path, POLICY, fps=2)[:6]  # the muxer of MPEG leaves a gap, and so a seventh
    print(f"{name}: {numbers(frames)} at {[frame.seconds for frame in frames]}")
    assert [frame.seconds for frame in frames] == [0, 0.5, 1, 1.5, 2, 2.5]
    shown = np.array(numbers(frames)) - [0, 12, 25, 37, 50, 62]
    assert (np.abs((shown + 16) % 32 - 16) <= (1 if name == "a.mpg" else 0)).all()  # coarse greys
    assert all(frame.image.mode == "RGB" and frame.image.size == (64, 48) for frame in frames)


def test_sources(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", 2.0)
    for source in (path, str(path), path.read_bytes()):
        assert numbers(sample_frames(source, POLICY)) == [0, 10]


@pytest.mark.parametrize(("seconds", "fps", "count"), [(0.1, 1.0, 1), (3.0, 1.0, 3), (3.0, 0.1, 1), (3.0, 10.0, 30)])
def test_counts(seconds: float, fps: float, count: int, tmp_path: Path) -> None:
    assert len(sample_frames(video(tmp_path / "a.mp4", seconds), POLICY, fps=fps)) == count


def test_a_long_video_is_spread_evenly(tmp_path: Path) -> None:
    frames = sample_frames(video(tmp_path / "a.mp4", 3.0), POLICY, fps=10, max_frames=6)
    assert [frame.seconds for frame in frames] == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5])
    assert numbers(frames) == [0, 5, 10, 15, 20, 25]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
@pytest.mark.parametrize("key_every", [1, 7, 1000])
def test_jumping_shows_what_playing_shows(
    name: str, key_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = video(tmp_path / name, 3.1, key_every=key_every)
    jumped = [numbers(sample_frames(path, POLICY, fps=fps)) for fps in (0.7, 1.3, 9)]
    monkeypatch.setattr(module, "bisect_right", lambda *_: 0)
    assert [numbers(sample_frames(path, POLICY, fps=fps)) for fps in (0.7, 1.3, 9)] == jumped


def test_few_frames_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = video(tmp_path / "a.mp4", 60.0, key_every=10)
    decoded = []
    original = module._decoded

    def count(*arguments: object):
        for item in original(*arguments):  # type: ignore[arg-type]
            decoded.append(item[0])
            yield item

    monkeypatch.setattr(module, "_decoded", count)
    sample_frames(path, POLICY, max_frames=6)
    print(f"{len(decoded)} of 600 frames decoded for 6")
    assert len(decoded) < 100


def test_variable_frame_rate(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mkv", 0, times=[0, 0.1, 0.2, 1.9, 2.05, 4.0])
    frames = sample_frames(path, POLICY, fps=1)
    print(f"{numbers(frames)} at {[frame.seconds for frame in frames]}")
    assert numbers(frames)[:5] == [0, 2, 3, 4, 5]


def test_a_late_start_counts_as_0(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mkv", 0, times=[5 + i / 10 for i in range(20)])
    frames = sample_frames(path, POLICY, fps=2)
    assert [frame.seconds for frame in frames] == [0, 0.5, 1, 1.5]
    assert numbers(frames) == [0, 5, 10, 15]


def with_rotation(file: bytes, degrees: int) -> bytes:
    """An MP4 whose track header says to turn its pictures clockwise."""
    matrix = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    a, b, c, d = (value * 65536 for value in matrix)
    at = file.index(b"tkhd") + 4 + 40
    packed = b"".join(value.to_bytes(4, "big", signed=True) for value in (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    return file[:at] + packed + file[at + 36 :]


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation(degrees: int, tmp_path: Path) -> None:
    def draw(_: int) -> np.ndarray:
        corner = np.zeros((48, 64, 3), np.uint8)
        corner[:16, :16] = 255
        return corner

    file = video(tmp_path / "a.mp4", 1.0, draw=draw).read_bytes()
    (frame,) = sample_frames(with_rotation(file, degrees), POLICY)
    expected = np.rot90(draw(0), -degrees // 90)
    assert frame.image.size == expected.shape[1::-1]
    difference = np.abs(np.asarray(frame.image).astype(int) - expected).mean()
    print(f"{degrees} degrees: mean difference {difference:.3g} of 255")
    assert difference < 10


def test_size_is_what_the_encoder_would_make_of_it(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", 1.0, draw=lambda i: gradient(320, 180))
    (whole,), (small,) = sample_frames(path, POLICY), sample_frames(path, POLICY, size=96)
    assert whole.image.size == (320, 180) and small.image.size == (96, 96)
    np.testing.assert_array_equal(to_pixels(resize(whole.image, 96), 1 / 255), to_pixels(small.image, 1 / 255))


def test_sound_beside_the_picture_and_cut_off_files(tmp_path: Path) -> None:
    data = video(tmp_path / "a.webm", 3.0, codec="libvpx").read_bytes()
    kept = sample_frames(data[: len(data) * 2 // 3], POLICY, fps=10)
    print(f"{len(kept)} of 30 frames of a file cut off")
    assert 5 < len(kept) < 30 and numbers(kept) == list(range(len(kept)))


def test_a_playlist_opens_nothing(tmp_path: Path) -> None:
    """FFmpeg would open what a playlist names."""
    clip = video(tmp_path / "a.ts", 1.0)
    for name, text in (
        ("list.m3u8", f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{clip}\n#EXT-X-ENDLIST\n"),
        ("list.txt", f"ffconcat version 1.0\nfile '{clip}'\n"),
    ):
        path = tmp_path / name
        path.write_text(text)
        for source in (path, text.encode()):
            with pytest.raises(MediaError, match="not a video"):
                sample_frames(source, POLICY)


def test_decoded_frames_are_not_kept(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", 20.0, draw=lambda i: np.full((480, 640, 3), i % 256, np.uint8), key_every=1000)
    code = f"""
import resource
from gemma3n_onnx.runtime.media import fetch, video
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
video.sample_frames({str(path)!r}, fetch.FetchPolicy(), max_frames=1, size=32)
before = peak()
print(len(video.sample_frames({str(path)!r}, fetch.FetchPolicy(), fps=10, max_frames=200, size=32)), peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, mib = done.stdout.split()
    print(f"{float(mib):.1f} MiB more at the peak for {count} frames that have 176 MiB")
    assert count == "200" and float(mib) < 60


def test_options() -> None:
    for options in ({"fps": 0}, {"fps": -1}, {"fps": float("nan")}, {"max_frames": 0}):
        with pytest.raises(OptionError):
            sample_frames(b"", POLICY, **options)  # type: ignore[arg-type]


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = video(tmp_path / "a.mp4", 1.0)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(PackageMissingError, match=r"gemma3n-onnx\[video\]"):
        sample_frames(path, POLICY)


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="only audio"):
        sample_frames(aac(tmp_path / "a.m4a", tone(1)), POLICY)
