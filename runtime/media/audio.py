"""Decodes audio to mono samples and computes the audio encoder's log-mel features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, get_args

import numpy as np

from gemma3n_onnx.runtime.artifact import LogMelInfo
from gemma3n_onnx.runtime.errors import AudioTooLongError, MediaError, OptionError, PackageMissingError

from .budget import current_budget
from .decoding import DecodingMemory
from .fetch import FetchPolicy, Source, open_media
from .wav import WavData

if TYPE_CHECKING:
    AudioSource = Source | np.ndarray | tuple[np.ndarray, float]

LongAudio = Literal["error", "split"]
LONG_AUDIO = get_args(LongAudio)

MAX_SECONDS = 3600.0
RATES_HZ = (1_000, 768_000)
MAX_CHANNELS = 64
# Full scale is 1. Loud lossy files decode slightly above it; integers cast to float without scaling, far above.
LARGEST_FLOAT = 8.0
# A peak-to-peak range up to this is silence: three 16-bit steps, the residue of dithering.
SILENT_SPAN = 1e-4
BLOCK_FRAMES = 1 << 16
BLOCK_BYTES = BLOCK_FRAMES * MAX_CHANNELS * 4
ADVICE = "split the audio into shorter files"
# A file that decodes to less than this fraction of its declared length is truncated.
COMPLETE = 0.95
BY_SOUNDFILE = "WAV, FLAC, MP3 or Ogg"
BY_AV = "M4A, AAC or WebM"
UNKNOWN_LENGTH = 1 << 60

# `fit` searches the last sixth of a window for the 100 ms span of least energy, in steps of 10 ms.
SEARCHED_PART = 6
PAUSE_STEPS = 10
STEPS_PER_SECOND = 100


def load_audio(
    source: AudioSource,
    policy: FetchPolicy,
    sample_rate_hz: int,
    rate: float | None = None,
    max_seconds: float = MAX_SECONDS,
    warn: Callable[[str], None] = lambda _: None,
) -> np.ndarray:
    """Samples [n] fp32 at `sample_rate_hz`, channels averaged, full scale from -1 to 1.

    Source: any `open_media` source (libsndfile decodes WAV, FLAC, MP3 and Ogg; PyAV decodes M4A, AAC, WebM and
    video files), an array [n] or [n, channels] with its `rate` in Hz, or the pair (array, rate). int16, int32 and
    uint8 arrays are scaled to full scale; floats are used unscaled, up to `LARGEST_FLOAT`. A WAV that is cut off or
    does not declare its length is read to its end, and `warn` is told.

    Raises:
        AudioTooLongError: longer than `max_seconds`.
        MediaError: not audio, damaged, empty, silent, or an unsupported array.
        MediaNotFoundError, UrlRefusedError: as `open_media` raises them.
        PackageMissingError: soundfile or soxr is needed and not installed.
    """
    if isinstance(source, tuple):
        if len(source) != 2 or rate is not None:
            raise MediaError("A pair must be (samples, rate); give no other rate.")
        source, rate = source
    if isinstance(source, np.ndarray):
        if rate is None:
            raise MediaError("An audio array needs its sampling rate; pass rate in Hz.")
        hz = _check_rate(rate)
        mono = _checked(source)
        _check_seconds(len(mono) / hz, max_seconds)
        samples = _Resampler(hz, sample_rate_hz).all_of(iter([mono]))
    elif rate is not None:
        raise MediaError("rate is for arrays only, because a file declares its own; leave it out.")
    else:
        with open_media(source, policy) as file:
            samples = _decode(file, policy.decoding, sample_rate_hz, max_seconds, warn)
    if not samples.size:
        raise MediaError("The audio has no samples; check the recording.")
    if np.ptp(samples) <= SILENT_SPAN:
        raise MediaError("The audio is silent from beginning to end; check the microphone or the file.")
    return samples


class LogMel:
    """The log-mel features of one clip, as the checkpoint's feature extractor computes them."""

    def __init__(self, info: LogMelInfo) -> None:
        self.info = info
        phase = np.arange(info.frame_length, dtype=np.float32) * (2 * np.pi) / info.frame_length
        self._window = (0.5 * (1 - np.cos(phase))).astype(np.float32)
        self._filters = mel_filters(info)

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """samples [n] fp32 -> features [T, mel_bins] fp32, mask [T] bool, False where a frame begins in the padding.

        T covers the samples padded with zeros to a multiple of `pad_multiple`.

        Raises:
            AudioTooLongError: more than `max_samples`; split the clip with `fit`.
            MediaError: fewer samples than one frame needs.
        """
        info, count = self.info, len(samples)
        if count > info.max_samples:
            raise _too_long(count, info)
        if count <= info.frame_length:
            needed = (info.frame_length + 1) / info.sample_rate_hz
            raise MediaError(
                f"The audio lasts {count / info.sample_rate_hz:.3f} s, but the model needs at least {needed:.3f} s; "
                "give a longer clip."
            )
        padded = np.zeros(-(-count // info.pad_multiple) * info.pad_multiple, np.float32)
        padded[:count] = samples
        # Windows [T, frame_length + 1]: the reference takes one more sample than it uses.
        windows = np.lib.stride_tricks.sliding_window_view(padded, info.frame_length + 1)[:: info.hop_length]
        frames = np.empty((len(windows), info.frame_length), np.float32)
        frames[:, 0] = windows[:, 0] * (1 - info.preemphasis)
        frames[:, 1:] = windows[:, 1:-1] - info.preemphasis * windows[:, :-2]
        magnitudes = np.abs(np.fft.rfft(frames * self._window, n=info.fft_length))
        features = np.log(np.maximum(magnitudes @ self._filters, info.mel_floor)).astype(np.float32)
        return features, np.arange(len(features)) * info.hop_length < count


def mel_filters(info: LogMelInfo) -> np.ndarray:
    """Triangular filters [fft_length / 2 + 1, mel_bins] fp64 with peak 1, evenly spaced on the HTK mel scale."""
    bins_hz = np.arange(info.fft_length // 2 + 1) * (info.sample_rate_hz / info.fft_length)
    lowest, highest = (2595 * math.log10(1 + hz / 700) for hz in (info.min_frequency_hz, info.max_frequency_hz))
    edges_hz = 700 * (10 ** (np.linspace(lowest, highest, info.mel_bins + 2) / 2595) - 1)
    widths = np.diff(edges_hz)
    distances = edges_hz - bins_hz[:, None]
    return np.maximum(0, np.minimum(-distances[:, :-2] / widths[:-1], distances[:, 2:] / widths[1:]))


def fit(samples: np.ndarray, info: LogMelInfo, long_audio: LongAudio = "error") -> list[np.ndarray]:
    """Splits samples [n] into consecutive clips of at most `max_samples`.

    Each cut is at the quietest point in the last sixth of a window, and leaves enough samples for a frame.

    Raises:
        AudioTooLongError: more than `max_samples`, and `long_audio` is "error".
        OptionError: `long_audio` is neither "error" nor "split".
    """
    if long_audio not in LONG_AUDIO:
        raise OptionError(f"long_audio is {long_audio!r}; choose error or split.", option="long_audio")
    if len(samples) > info.max_samples and long_audio == "error":
        raise _too_long(len(samples), info)
    clips = []
    while len(samples) > info.max_samples:
        latest = min(info.max_samples, len(samples) - info.frame_length - 1)
        earliest = min(latest, info.max_samples - info.max_samples // SEARCHED_PART)
        cut = earliest + _quietest(samples[earliest:latest], info.sample_rate_hz // STEPS_PER_SECOND)
        clips.append(samples[:cut])
        samples = samples[cut:]
    return [*clips, samples]


def _quietest(samples: np.ndarray, step: int) -> int:
    """The middle of the quietest `PAUSE_STEPS` steps, the last on a tie; the end if there are fewer steps."""
    if len(samples) < PAUSE_STEPS * step:
        return len(samples)
    energies = np.square(samples[: len(samples) // step * step].reshape(-1, step), dtype=np.float64).sum(axis=1)
    spans = np.lib.stride_tricks.sliding_window_view(energies, PAUSE_STEPS).sum(axis=1)
    return (len(spans) - 1 - int(np.argmin(spans[::-1]))) * step + PAUSE_STEPS * step // 2


def _too_long(count: int, info: LogMelInfo) -> AudioTooLongError:
    seconds, most = count / info.sample_rate_hz, info.max_samples / info.sample_rate_hz
    return AudioTooLongError(
        f"The audio lasts {seconds:.2f} s, but the model takes at most {most:g} s; "
        'shorten it, or give long_audio="split" to split it at pauses.',
        option="long_audio",
    )


def _checked(values: np.ndarray) -> np.ndarray:
    """An array of samples -> mono [n] fp32."""
    if values.ndim not in (1, 2) or (values.ndim == 2 and not 0 < values.shape[1] <= MAX_CHANNELS):
        shape = " x ".join(map(str, values.shape)) or "a scalar"
        raise MediaError(
            f"An audio array must be samples or samples x channels (at most {MAX_CHANNELS}), not {shape}; reshape it."
        )
    if values.dtype == np.uint8:
        scaled = (values.astype(np.float32) - 128) / 128
    elif values.dtype in (np.int16, np.int32):
        scaled = (values / -float(np.iinfo(values.dtype).min)).astype(np.float32)
    elif values.dtype.kind == "f":
        scaled = values.astype(np.float32, copy=False)
        _check_floats(scaled)
    else:
        raise MediaError(f"An audio array must be float, int16, int32 or uint8, not {values.dtype}; convert it.")
    return _mono(scaled)


def _check_floats(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise MediaError("The audio has NaN or infinite samples; give finite samples from -1 to 1.")
    if values.size and (peak := float(np.abs(values).max())) > LARGEST_FLOAT:
        raise MediaError(f"The audio's samples reach {peak:g}, but full scale is 1; scale them to -1 to 1.")


def _mono(values: np.ndarray) -> np.ndarray:
    return values if values.ndim == 1 else values.mean(axis=1)


def _check_rate(rate: Any) -> int:
    whole = isinstance(rate, (int, float, np.integer, np.floating)) and not isinstance(rate, bool) and rate % 1 == 0
    if not whole or not RATES_HZ[0] <= rate <= RATES_HZ[1]:
        raise MediaError(
            f"A sampling rate of {rate} Hz is not supported; give a whole number from {RATES_HZ[0]:,} to "
            f"{RATES_HZ[1]:,}."
        )
    return int(rate)


def _check_seconds(seconds: float, most: float) -> None:
    if seconds > most:
        raise AudioTooLongError(f"The audio lasts more than the {most:g} s allowed; split it into shorter files.")


class _Resampler:
    """Resamples mono blocks with soxr HQ, bit-identical to librosa's default."""

    def __init__(self, from_hz: int, to_hz: int) -> None:
        self._ratio = to_hz / from_hz
        self._stream = None
        if from_hz != to_hz:
            try:
                import soxr
            except ImportError as error:
                raise _missing("soxr", f"Resampling audio from {from_hz} to {to_hz} Hz") from error
            self._stream = soxr.ResampleStream(from_hz, to_hz, 1, dtype="float32", quality="HQ")

    def all_of(self, blocks: Iterator[np.ndarray]) -> np.ndarray:
        if self._stream is None:
            return np.concatenate([np.zeros(0, np.float32), *blocks])
        count, done = 0, []
        for block in blocks:
            count += len(block)
            done += [
                self._stream.resample_chunk(block[i : i + BLOCK_FRAMES]) for i in range(0, len(block), BLOCK_FRAMES)
            ]
        done.append(self._stream.resample_chunk(np.zeros(0, np.float32), last=True))
        samples = np.concatenate(done)
        length = math.ceil(count * self._ratio)
        return np.pad(samples[:length], (0, max(0, length - len(samples))))


def _decode(
    file: BinaryIO, memory: DecodingMemory, sample_rate_hz: int, max_seconds: float, warn: Callable[[str], None]
) -> np.ndarray:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: libsndfile is missing
        raise _missing("soundfile", "Reading an audio file") from error
    if not file.read(1):
        raise MediaError("The file is empty; record or download it again.")
    wav = WavData.of(file)
    if wav is not None and wav.is_streamed:
        file = wav.with_size(file)
        warn("The WAV does not declare its length, so it was read to the end of the file.")
    file.seek(0)
    try:
        sound = soundfile.SoundFile(file)
    except soundfile.SoundFileError:
        file.seek(0)
        with memory.reserved(_decoded_bytes(max_seconds, sample_rate_hz), ADVICE):
            return _decode_with_av(file, sample_rate_hz, max_seconds)
    with sound:
        rate = _check_rate(sound.samplerate)
        if sound.channels > MAX_CHANNELS:
            raise MediaError(f"The audio has {sound.channels} channels; give at most {MAX_CHANNELS}.")
        declared = sound.frames if sound.frames < UNKNOWN_LENGTH else 0
        _check_seconds(declared / rate, max_seconds)
        if wav is not None and not wav.is_streamed and 0 < wav.present < wav.declared:
            warn(f"The WAV is cut off: it declares {wav.declared:,} bytes of sound but has {wav.present:,}.")
        seconds = declared / rate if declared else max_seconds
        try:
            with memory.reserved(_decoded_bytes(seconds, sample_rate_hz), ADVICE):
                return _Resampler(rate, sample_rate_hz).all_of(_sound_blocks(sound, rate, declared, max_seconds))
        except soundfile.SoundFileError as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise MediaError(f"The audio file is damaged ({reason}); save or download it again.") from error


def _decoded_bytes(seconds: float, sample_rate_hz: int) -> int:
    """Of the samples, in blocks and joined, and of one block of all channels."""
    return math.ceil(min(seconds, current_budget().left("seconds")) * sample_rate_hz) * 8 + BLOCK_BYTES


def _sound_blocks(sound: Any, rate: int, declared: int, max_seconds: float) -> Iterator[np.ndarray]:
    count, budget = 0, current_budget()
    while len(block := sound.read(BLOCK_FRAMES, dtype="float32", always_2d=True)):
        count += len(block)
        budget.spend("seconds", len(block) / rate)
        _check_seconds(count / rate, max_seconds)
        _check_floats(block)
        yield _mono(block)
    if count < COMPLETE * declared:
        raise MediaError(
            f"The audio file is cut off: it declares {declared / rate:.2f} s but has {count / rate:.2f} s; "
            "save or download it again."
        )


def _decode_with_av(file: BinaryIO, sample_rate_hz: int, max_seconds: float) -> np.ndarray:
    """Decodes formats that libsndfile does not read."""
    from .video import check_codec, open_container

    try:
        import av  # noqa: F401
    except ImportError as error:
        raise MediaError(
            f'This is not {BY_SOUNDFILE} audio; for {BY_AV} pip install "gemma3n-onnx[video]", or convert it to WAV.'
        ) from error
    with open_container(file, f"This is neither {BY_SOUNDFILE} nor {BY_AV} audio") as container:
        if not container.streams.audio:
            raise MediaError("The file has no audio stream; give a file with audio.")
        stream = container.streams.audio[0]
        check_codec(stream)
        rate = _check_rate(stream.codec_context.sample_rate)
        return _Resampler(rate, sample_rate_hz).all_of(_av_blocks(container, stream, rate, max_seconds))


def _av_blocks(container: Any, stream: Any, rate: int, max_seconds: float) -> Iterator[np.ndarray]:
    import av

    # Packed: on planar frames of more than 8 channels, PyAV reads past the plane pointers.
    to_float = av.AudioResampler(format="flt", rate=rate)
    count, budget = 0, current_budget()
    for frame in container.decode(stream):
        budget.check()
        for part in to_float.resample(frame):
            block = part.to_ndarray().reshape(part.samples, -1)
            count += len(block)
            budget.spend("seconds", len(block) / rate)
            _check_seconds(count / rate, max_seconds)
            _check_floats(block)
            yield _mono(block)


def _missing(package: str, what: str) -> PackageMissingError:
    return PackageMissingError(f'{what} needs {package}, which is not installed; pip install "gemma3n-onnx[audio]".')
