"""Samples frames of a video at equal intervals."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from gemma3n_onnx.runtime.errors import MediaError, OptionError, PackageMissingError

from .budget import current_budget
from .fetch import FetchPolicy, Source, open_media
from .image import resize
from .limits import MAX_PIXELS

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_FRAMES = 32
# Self-contained formats. Others (playlists, concatenations) make FFmpeg open further files and URLs.
DEMUXERS = "aac,asf,avi,flac,flv,gif,h264,hevc,ivf,matroska,mov,mp3,mpeg,mpegts,ogg,wav"
USUAL_FPS = 25
THREADS = 2
# Bytes a pixel of a frame: up to 16 reference frames, one for each thread, and an RGB image.
DECODER_BYTES = 40
TOLERANCE_SECONDS = 1e-6


@dataclass(frozen=True)
class Frame:
    """A video frame and its time."""

    image: Image
    seconds: float


def sample_frames(
    source: Source, policy: FetchPolicy, fps: float = 1.0, max_frames: int = MAX_FRAMES, size: int | None = None
) -> list[Frame]:
    """The frames shown at 0, 1/fps, 2/fps, … seconds, in mode RGB, upright.

    If there are more than `max_frames`, that many are sampled at equal intervals from 0 on. With `size`, each frame
    is resized to that square as soon as it is decoded, to save memory.

    Raises:
        OptionError: `fps` or `max_frames` is not positive.
        MediaError: not a video, damaged, or without a frame.
        MediaNotFoundError, UrlRefusedError: as `open_media` raises them.
        PackageMissingError: PyAV is not installed.
    """
    if not 0 < fps < math.inf:
        raise OptionError(f"fps is {fps}; it must be positive.")
    if max_frames < 1:
        raise OptionError(f"max_frames is {max_frames}; it must be at least 1.", option="max_frames")
    with open_media(source, policy) as file:
        timeline = _scan(file)
        count = max(1, math.ceil(timeline.seconds * fps - TOLERANCE_SECONDS))
        distance = 1 / fps if count <= max_frames else timeline.seconds / max_frames
        times = [i * distance for i in range(min(count, max_frames))]
        budget = current_budget()
        budget.spend("seconds", timeline.seconds)
        budget.spend("frames", len(times))
        budget.spend("pixels", len(times) * timeline.pixels)
        kept = 4 * len(times) * (timeline.pixels if size is None else size * size)
        with policy.decoding.reserved(timeline.pixels * DECODER_BYTES + kept, "scale the video down"):
            images = (_to_image(frame, size) for frame in _shown_at(file, timeline, times))
            return [Frame(image, time) for image, time in zip(images, times)]


@contextmanager
def open_container(file: BinaryIO, complaint: str) -> Iterator[Any]:
    """Opens a PyAV container at the start of `file`. In this context FFmpeg errors become MediaErrors.

    Raises:
        MediaError: the format is not supported (the message starts with `complaint`), or the file is damaged.
        PackageMissingError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise PackageMissingError(
            'Reading a video needs PyAV, which is not installed; pip install "gemma3n-onnx[video]".'
        ) from error
    file.seek(0)
    if not file.read(1):
        raise MediaError("The file is empty; record or download it again.")
    file.seek(0)
    try:
        container = av.open(file, container_options={"format_whitelist": DEMUXERS})
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{complaint} ({_reason(error)}); give another file.") from error
    with container:
        try:
            yield container
        except MediaError:
            raise
        except (av.FFmpegError, OSError, ValueError) as error:
            raise MediaError(f"The file is damaged ({_reason(error)}); save or download it again.") from error


def check_codec(stream: Any) -> None:
    """Raises MediaError if FFmpeg does not know the codec."""
    if stream.codec_context is None:
        raise MediaError("The file's codec is not known; convert it to a common one.")


@dataclass(frozen=True)
class _Timeline:
    """Start, end and key frames of a video stream, in seconds of its own timestamps; the pixels of a frame.

    `frame_seconds` is set for raw streams, which have no timestamps: their frames are counted.
    """

    start: float
    end: float
    key_frames: list[float]
    pixels: int
    frame_seconds: float | None

    @property
    def seconds(self) -> float:
        return self.end - self.start


def _scan(file: BinaryIO) -> _Timeline:
    """Demuxes all packets without decoding: the header's duration and index may be missing or wrong."""
    begins, ends, key_frames, count = [], [], [], 0
    budget = current_budget()
    with _open_stream(file) as (container, stream):
        usual = 1 / float(stream.average_rate or USUAL_FPS)
        pixels = stream.codec_context.width * stream.codec_context.height
        for packet in container.demux(stream):
            budget.check()
            count += bool(packet.size)
            if packet.pts is None or packet.is_discard:
                continue
            begins.append(float(packet.pts * stream.time_base))
            ends.append(begins[-1] + (float(packet.duration * stream.time_base) if packet.duration else usual))
            if packet.is_keyframe:
                key_frames.append(begins[-1])
    if not count:
        raise MediaError("The video has no frames; give another file.")
    if not begins:
        return _Timeline(0.0, count * usual, [], pixels, usual)
    return _Timeline(min(begins), max(ends), sorted(key_frames), pixels, None)


def _shown_at(file: BinaryIO, timeline: _Timeline, times: list[float]) -> Iterator[Any]:
    """For each of the ascending times, in seconds from the start, the last frame that starts by then, or the first."""
    key_frames = timeline.key_frames
    frames = _decoded(file, timeline)
    shown, coming = None, next(frames, None)
    for time in times:
        due = timeline.start + time + TOLERANCE_SECONDS
        place = bisect_right(key_frames, due) - 1
        if coming is not None and place >= 0 and key_frames[place] > coming[0]:
            frames.close()
            frames = _decoded(file, timeline, key_frames[place])
            shown, coming = None, next(frames, None)
            if coming is None or coming[0] > due:  # seeking does not work in this container
                key_frames = []
                frames = _decoded(file, timeline)
                coming = next(frames, None)
        while coming is not None and (shown is None or coming[0] <= due):
            shown, coming = coming, next(frames, None)
        if shown is None:
            raise MediaError("The video has no frame that can be decoded; give another file.")
        yield shown[1]
    frames.close()


def _decoded(
    file: BinaryIO, timeline: _Timeline, key_frame: float | None = None
) -> Generator[tuple[float, Any], None, None]:
    """(time, frame) in display order, from the start or from the key frame at `key_frame` seconds."""
    budget = current_budget()
    with _open_stream(file) as (container, stream):
        if key_frame is not None:
            container.seek(round(key_frame / stream.time_base), stream=stream)
        frames = container.decode(stream)
        if key_frame is not None:
            frames = itertools.dropwhile(lambda frame: not frame.key_frame, frames)
        for index, frame in enumerate(frames):
            budget.check()
            if timeline.frame_seconds is not None:
                yield index * timeline.frame_seconds, frame
            elif frame.pts is not None:
                yield float(frame.pts * frame.time_base), frame


@contextmanager
def _open_stream(file: BinaryIO) -> Iterator[tuple[Any, Any]]:
    """Opens the container, and its first video stream that is not cover art."""
    with open_container(file, "This is not a video in a supported format") as container:
        from av.stream import Disposition

        streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not streams:
            raise MediaError("The file has no video stream, only audio; give a video, or pass it as audio.")
        stream = streams[0]
        check_codec(stream)
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise MediaError(f"The video's frames are too large ({width:,} x {height:,} pixels); scale them down.")
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # if the size changes mid-stream
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = THREADS
        yield container, stream


def _to_image(frame: Any, size: int | None) -> Image:
    image = frame.to_image()
    if frame.rotation:
        image = image.rotate(frame.rotation, expand=True)
    return resize(image, size) if size else image


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()).rstrip(".") or type(error).__name__
