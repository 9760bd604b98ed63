"""Every kind of clip becomes mono samples as it sounds; long ones are cut at pauses."""

from __future__ import annotations

import base64
import dataclasses
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma3n_onnx.runtime.errors import AudioTooLongError, MediaError, OptionError, PackageMissingError
from gemma3n_onnx.runtime.media.audio import LogMel, fit, load_audio
from gemma3n_onnx.runtime.media.fetch import FetchPolicy
from media import LOG_MEL, RATE_HZ, aac, chirp, noise, sound, speech, tone, write_wav

POLICY = FetchPolicy()


def loaded(source: Any, rate: float | None = None) -> np.ndarray:
    samples = load_audio(source, POLICY, RATE_HZ, rate=rate)
    assert samples.dtype == np.float32 and samples.ndim == 1
    return samples


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference over that of what is expected, in the middle, over lags of up to 50 ms."""
    middle = slice(4000, 12_000)
    lags = range(-800, 801)
    return min(
        float(np.sqrt(np.mean((np.roll(actual, lag)[middle] - expected[middle]) ** 2) / np.mean(expected[middle] ** 2)))
        for lag in lags
    )


def test_every_source_gives_the_same_samples(tmp_path: Path) -> None:
    samples = tone(1.0)
    path = write_wav(tmp_path / "tone.wav", samples)
    data = path.read_bytes()
    text = base64.b64encode(data).decode()
    for source in (path, str(path), data, text, f"data:audio/wav;base64,{text}"):
        assert np.abs(loaded(source) - samples).max() < 1e-4


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize(
    ("format", "subtype", "tolerance"),
    [
        ("WAV", "PCM_U8", 0.03),
        ("WAV", "PCM_16", 0.001),
        ("WAV", "PCM_24", 0.001),
        ("WAV", "FLOAT", 0.001),
        ("WAV", "ULAW", 0.05),
        ("FLAC", "PCM_16", 0.001),
        ("AIFF", "PCM_16", 0.001),
        ("MP3", "MPEG_LAYER_III", 0.1),
        ("OGG", "VORBIS", 0.15),
        ("OGG", "OPUS", 0.2),
    ],
)
def test_formats_and_rates(format: str, subtype: str, tolerance: float, rate: int) -> None:
    if subtype == "OPUS" and rate in (22_050, 44_100):
        pytest.skip("Opus has no such rate")
    left, right = chirp(1.2, 200, 2000, rate), tone(1.2, 700, rate)
    stereo = np.stack([left, right], axis=-1)
    expected = (chirp(1.2, 200, 2000) + tone(1.2, 700)) / 2
    actual = loaded(sound(stereo, rate, format, subtype))
    error = relative_error(actual, expected)
    print(f"{format} {subtype} at {rate} Hz: {len(actual)} samples, relative error {error:.3g}")
    assert error < tolerance
    assert abs(len(actual) - len(expected)) < 3000


@pytest.mark.parametrize("name", ["clip.m4a", "clip.aac", "clip.webm", "clip.mp4"])
def test_what_only_pyav_decodes(name: str, tmp_path: Path) -> None:
    actual = loaded(aac(tmp_path / name, chirp(1.2, 200, 2000, 48_000), 48_000))
    error = relative_error(actual, chirp(1.2, 200, 2000))
    print(f"{name}: {len(actual)} samples, relative error {error:.3g}")
    assert error < 0.25


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_channels_are_averaged(channels: int) -> None:
    samples = np.stack([tone(0.5, 300 * (1 + c)) for c in range(channels)], axis=-1)
    assert np.abs(loaded(sound(samples, RATE_HZ, "WAV", "FLOAT")) - samples.mean(axis=1)).max() < 1e-6
    assert np.abs(loaded(samples, RATE_HZ) - samples.mean(axis=1)).max() < 1e-6


@pytest.mark.parametrize(
    ("array", "tolerance"),
    [
        (tone(0.2), 0),
        (tone(0.2).astype(np.float64), 0),
        (tone(0.2).astype(np.float16), 1e-3),
        ((tone(0.2) * 2**15).astype(np.int16), 2**-15),
        ((tone(0.2).astype(np.float64) * 2**31).astype(np.int32), 1e-7),
        (np.rint(tone(0.2) * 128 + 128).astype(np.uint8), 2**-8),
    ],
    ids=["float32", "float64", "float16", "int16", "int32", "uint8"],
)
def test_arrays_at_full_scale_1(array: np.ndarray, tolerance: float) -> None:
    difference = np.abs(loaded(array, RATE_HZ) - tone(0.2)).max()
    print(f"{array.dtype}: largest difference {difference:.3g}")
    assert difference <= tolerance
    np.testing.assert_array_equal(loaded((array, RATE_HZ)), loaded(array, RATE_HZ))


def test_blocks_do_not_show() -> None:
    """A file is resampled block by block, to the bit as in one piece."""
    soxr = pytest.importorskip("soxr")
    samples = noise(12, 44_100)
    whole = soxr.resample(samples, 44_100, RATE_HZ, quality="HQ")
    actual = loaded(sound(samples, 44_100, "WAV", "FLOAT"))
    np.testing.assert_array_equal(actual[: len(whole)], whole)


def test_a_long_recording_is_not_decoded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    import soundfile

    file = sound(np.zeros(8000 * 60, np.float32), 8000, "MP3")
    frames = []
    read = soundfile.SoundFile.read

    def count(self: Any, *arguments: Any, **options: Any) -> np.ndarray:
        frames.append(len(block := read(self, *arguments, **options)))
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", count)
    monkeypatch.setattr(soundfile.SoundFile, "frames", property(lambda _: (1 << 63) - 1))
    with pytest.raises(AudioTooLongError, match="more than the 10 s"):
        load_audio(file, POLICY, RATE_HZ, max_seconds=10)
    assert sum(frames) < 8000 * 20


class Pipe:
    """What FFmpeg cannot seek in, so that it leaves the sizes of a WAV at 0xFFFFFFFF."""

    def __init__(self) -> None:
        self.written = bytearray()

    def write(self, data: bytes) -> int:
        self.written += data
        return len(data)


def streamed_by_ffmpeg(samples: np.ndarray) -> bytes:
    import av

    pipe = Pipe()
    with av.open(pipe, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=RATE_HZ, layout="mono")
        pcm = np.rint(samples * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
        frame.rate = RATE_HZ
        container.mux([*stream.encode(frame), *stream.encode()])
    return bytes(pipe.written)


def with_sizes(wav: bytes, riff: int, data: int) -> bytes:
    place = wav.index(b"data") + 4
    changed = bytearray(wav)
    changed[4:8], changed[place : place + 4] = riff.to_bytes(4, "little"), data.to_bytes(4, "little")
    return bytes(changed)


def with_sizes_in_ds64(rf64: bytes, riff: int, data: int) -> bytes:
    place = rf64.index(b"ds64") + 8
    return rf64[:place] + riff.to_bytes(8, "little") + data.to_bytes(8, "little") + rf64[place + 16 :]


def decoded_by_ffmpeg(wav: bytes) -> np.ndarray:
    import av

    with av.open(io.BytesIO(wav)) as container:
        frames = [frame.to_ndarray().ravel() for frame in container.decode(audio=0)]
    return np.concatenate(frames).astype(np.float32) / 32768


WAV = sound(tone(1.5), RATE_HZ, "WAV")
UNSET = 0xFFFF_FFFF
RF64 = sound(tone(1.5), RATE_HZ, "RF64")


@pytest.mark.parametrize(
    "wav",
    [
        streamed_by_ffmpeg(tone(1.5)),
        with_sizes(WAV, UNSET, UNSET),
        with_sizes(WAV, 0, 0),
        with_sizes(WAV, 36, 0),
        with_sizes(WAV, UNSET, 0),
        with_sizes(WAV, len(WAV) - 8, 0),
        with_sizes(WAV, 0x7FFF_FFFF, 0x7FFF_FFDB),
        with_sizes(WAV, 0x8000_0024, 0x8000_0000),
    ],
    ids=["ffmpeg", "unset", "zero", "empty", "unset and zero", "only the data zero", "31 bits", "sox"],
)
def test_a_streamed_wav_is_read_to_its_end(wav: bytes) -> None:
    told: list[str] = []
    samples = load_audio(wav, POLICY, RATE_HZ, warn=told.append)
    assert told == ["The WAV does not declare its length, so it was read to the end of the file."]
    np.testing.assert_array_equal(samples, decoded_by_ffmpeg(wav))
    assert len(samples) == 1.5 * RATE_HZ and np.abs(samples - tone(1.5)).max() < 1e-4


def test_an_rf64_without_sizes_is_read_to_its_end() -> None:
    """FFmpeg reads nothing of it."""
    told: list[str] = []
    samples = load_audio(with_sizes_in_ds64(RF64, 0, 0), POLICY, RATE_HZ, warn=told.append)
    assert told == ["The WAV does not declare its length, so it was read to the end of the file."]
    np.testing.assert_array_equal(samples, loaded(RF64))


@pytest.mark.parametrize(
    ("container", "format", "declared"),
    [("WAV", "PCM_16", 48_000), ("WAV", "FLOAT", 96_000), ("WAV", "ULAW", 24_000), ("RF64", "PCM_24", 72_000)],
)
def test_a_wav_that_is_cut_off_is_read_as_far_as_it_goes(container: str, format: str, declared: int) -> None:
    whole = sound(tone(1.5), RATE_HZ, container, format)
    cut = whole[: whole.index(b"data") + 8 + (len(whole) - whole.index(b"data") - 8) // 3]
    told: list[str] = []
    samples = load_audio(cut, POLICY, RATE_HZ, warn=told.append)
    assert told == [f"The WAV is cut off: it declares {declared:,} bytes of sound but has {declared // 3:,}."]
    np.testing.assert_array_equal(samples, loaded(whole)[: RATE_HZ // 2])


def test_a_whole_wav_gives_no_warning() -> None:
    told: list[str] = []
    after = b"LIST" + (4).to_bytes(4, "little") + b"INFO"
    for wav in (WAV, with_sizes(WAV + after, len(WAV) + len(after) - 8, 48_000), RF64, sound(tone(1), RATE_HZ, "FLAC")):
        load_audio(wav, POLICY, RATE_HZ, warn=told.append)
    assert told == []
    with pytest.raises(MediaError, match="no samples"):
        loaded(with_sizes(WAV[: WAV.index(b"data") + 8] + after, 36 + len(after), 0))


@pytest.mark.parametrize(("package", "extra"), [("soundfile", "audio"), ("soxr", "audio")])
def test_a_missing_package_is_named(package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = sound(tone(1, rate=8000), 8000, "WAV")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PackageMissingError, match=rf'needs {package}, .* pip install "gemma3n-onnx\[{extra}\]"'):
        loaded(file)


def test_a_missing_resampler_is_named_for_pyavs_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = aac(tmp_path / "clip.m4a", tone(1, rate=48_000), 48_000)
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(PackageMissingError, match="needs soxr"):
        loaded(path)


def test_arrays_at_the_models_rate_need_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("soundfile", "soxr", "av"):
        monkeypatch.setitem(sys.modules, package, None)
    assert len(loaded(tone(1), RATE_HZ)) == RATE_HZ


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = aac(tmp_path / "clip.m4a", tone(1))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match=r"gemma3n-onnx\[video\]"):
        loaded(path)


def test_log_mel_of_the_shortest_clip_and_one_sample_less() -> None:
    log_mel = LogMel(LOG_MEL)
    features, mask = log_mel(noise(1)[:513])
    assert features.shape == (1, 128) and mask.tolist() == [True]
    with pytest.raises(MediaError, match="at least"):
        log_mel(noise(1)[:512])
    with pytest.raises(AudioTooLongError):
        log_mel(np.zeros(480_001, np.float32))


def test_log_mel_takes_silence() -> None:
    features, mask = LogMel(LOG_MEL)(np.zeros(16_000, np.float32))
    np.testing.assert_array_equal(features, np.float32(np.log(1e-5)))
    assert mask.all()


def test_frames_that_begin_in_the_padding_are_masked() -> None:
    """Padded to a multiple of 1024, as 128 with these lengths never shows a masked frame."""
    features, mask = LogMel(dataclasses.replace(LOG_MEL, pad_multiple=4096))(noise(1)[:5000])
    assert len(features) == 48 and mask.sum() == 32 and mask[:32].all()


def test_a_short_clip_stays_whole() -> None:
    samples = noise(30)
    for long_audio in ("error", "split"):
        assert [len(clip) for clip in fit(samples, LOG_MEL, long_audio)] == [480_000]  # type: ignore[arg-type]


def test_a_long_clip_is_an_error_by_default() -> None:
    with pytest.raises(AudioTooLongError, match=r'lasts 31.00 s, .* 30 s; .* long_audio="split"'):
        fit(noise(31), LOG_MEL)
    with pytest.raises(OptionError, match="error or split"):
        fit(noise(31), LOG_MEL, "cut")  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [480_001, 480_400, 480_513, 481_000, 700_123, 960_000, 960_001, 3_000_017])
def test_clips_cover_every_sample_once(count: int) -> None:
    samples = np.arange(count, dtype=np.float32)
    clips = fit(samples, LOG_MEL, "split")
    np.testing.assert_array_equal(np.concatenate(clips), samples)
    assert all(513 <= len(clip) <= 480_000 for clip in clips)
    assert all(len(clip) >= 400_000 for clip in clips[:-1])


def test_windows_too_small_to_search_are_cut_at_their_end() -> None:
    tiny = dataclasses.replace(LOG_MEL, max_samples=3000)
    clips = fit(noise(1), tiny, "split")
    assert sum(map(len, clips)) == RATE_HZ and all(513 <= len(clip) <= 3000 for clip in clips)


def test_cuts_fall_into_pauses() -> None:
    words, _ = speech("Read the last line, then rest.")
    pause = np.zeros(RATE_HZ // 2, np.float32)
    samples = np.concatenate([piece for _ in range(40) for piece in (words, pause)])
    clips = fit(samples, LOG_MEL, "split")
    cuts = np.cumsum([len(clip) for clip in clips])[:-1]
    print(f"{len(samples) / RATE_HZ:.1f} s cut at {(cuts / RATE_HZ).round(2).tolist()} s")
    assert len(cuts) >= 2
    assert max(np.abs(samples[cut - 400 : cut + 400]).max() for cut in cuts) < 0.01 * np.abs(samples).max()


def test_without_a_pause_the_quietest_place_is_cut() -> None:
    samples = noise(40)
    samples[27 * RATE_HZ : 27 * RATE_HZ + 3200] *= 0.3
    (first, _) = fit(samples, LOG_MEL, "split")
    assert 27 * RATE_HZ <= len(first) <= 27 * RATE_HZ + 3200
