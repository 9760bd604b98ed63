"""Converts the images, clips and videos of a prompt to encoder inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma3n_onnx.runtime.artifact import AudioInfo, Manifest, VisionInfo
from gemma3n_onnx.runtime.checks import require_integer, require_real
from gemma3n_onnx.runtime.errors import MediaError, OptionError

from .audio import LONG_AUDIO, LogMel, LongAudio, fit, load_audio
from .fetch import FetchPolicy, name_of, shorten
from .image import load_image, to_pixels
from .video import sample_frames

# OpenAI's image `detail`: picks the smallest or the largest of the artifact's image sizes.
DETAILS = {"low": min, "high": max}


@dataclass(frozen=True)
class MediaOptions:
    """How media are read.

    Attributes:
        image_size: side in pixels of the square that images are resized to; None for the artifact's default.
        long_audio: "error", or "split" to split long audio into consecutive clips.
        video_fps: frames sampled per second of video.
        max_frames: maximum frames of one video; a longer video is sampled at equal intervals.

    Raises:
        OptionError: a value is out of range.
    """

    image_size: int | None = None
    long_audio: LongAudio = "error"
    video_fps: float = 1.0
    max_frames: int = 16

    def __post_init__(self) -> None:
        if self.image_size is not None:
            require_integer("image_size", self.image_size, 1)
        if self.long_audio not in LONG_AUDIO:
            message = f"long_audio is {self.long_audio!r}; choose {' or '.join(LONG_AUDIO)}."
            raise OptionError(message, option="long_audio")
        require_real("video_fps", self.video_fps, lambda fps: fps > 0, "above 0")
        require_integer("max_frames", self.max_frames, 1)


@dataclass(frozen=True)
class Item:
    """One image, or a clip of `seconds`. Equal keys mean equal contents; `inputs()` makes the encoder's inputs, for a
    batch of one. `warnings` say what its file lacks."""

    modality: str
    key: bytes
    inputs: Callable[[], Mapping[str, np.ndarray]]
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()


class MediaReader:
    """Reads media with the preprocessing that an artifact's manifest describes.

    Errors and warnings begin with the path of the file, or with the kind and the `number` of the source: "image 2".
    """

    def __init__(self, manifest: Manifest, policy: FetchPolicy) -> None:
        self._modalities = manifest.modalities
        self._vision, self._audio, self._policy = manifest.vision, manifest.audio, policy

    def image(self, source: Any, options: MediaOptions, detail: str | None = None, *, number: int = 1) -> list[Item]:
        """One item. MediaError: the image cannot be read. OptionError: the encoder does not support the size."""
        vision = self._need_vision("an image")
        size = _image_size(vision, options, detail)
        with self._naming(source, f"image {number}") as warnings:
            image = load_image(source, self._policy, warnings.append, size)
        return [self._image_item(vision, image, warnings)]

    def video(self, source: Any, options: MediaOptions, *, number: int = 1) -> list[Item]:
        """One item for each sampled frame. Raises as `image`."""
        vision = self._need_vision("a video")
        size = _image_size(vision, options, None)
        with self._naming(source, f"video {number}"):
            frames = sample_frames(source, self._policy, options.video_fps, options.max_frames, size)
        return [self._image_item(vision, frame.image) for frame in frames]

    def clips(self, source: Any, options: MediaOptions, rate: int | None = None, *, number: int = 1) -> list[Item]:
        """One item, or several if long audio is split; the first has the warnings.

        Raises:
            MediaError: the audio cannot be read. AudioTooLongError: it is too long and may not be split.
        """
        if self._audio is None:
            raise self._lacks("audio", "audio")
        info = self._audio.log_mel
        log_mel = LogMel(info)
        with self._naming(source, f"audio {number}") as warnings:
            samples = load_audio(source, self._policy, info.sample_rate_hz, rate, warn=warnings.append)
            clips = fit(samples, info, options.long_audio)
            features = [log_mel(clip) for clip in clips]
        return [
            self._clip_item(self._audio, *pair, len(clip) / info.sample_rate_hz, () if place else warnings)
            for place, (clip, pair) in enumerate(zip(clips, features, strict=True))
        ]

    @contextmanager
    def _naming(self, source: Any, numbered: str) -> Iterator[list[str]]:
        """A list for warnings. These, and a MediaError that does not name the source yet, get its name."""
        name = name_of(source, self._policy) or numbered
        warnings: list[str] = []
        try:
            yield warnings
        except MediaError as error:
            if name in str(error) or (isinstance(source, str) and shorten(source) in str(error)):
                raise
            raise type(error)(f"{name}: {error}", option=error.option) from error
        warnings[:] = [f"{name}: {warning}" for warning in warnings]

    def _image_item(self, vision: VisionInfo, square: Any, warnings: Sequence[str] = ()) -> Item:
        name = vision.graph.inputs[0].name

        def inputs() -> Mapping[str, np.ndarray]:
            return {name: to_pixels(square, vision.rescale)[None]}

        key = hashlib.sha256(square.tobytes()).digest() + square.width.to_bytes(4, "little")
        return Item("vision", key, inputs, warnings=tuple(warnings))

    def _clip_item(
        self, audio: AudioInfo, features: np.ndarray, mask: np.ndarray, seconds: float, warnings: Sequence[str]
    ) -> Item:
        names = [tensor.name for tensor in audio.graph.inputs]
        key = hashlib.sha256(features.tobytes()).digest()
        inputs = dict(zip(names, (features[None], mask[None]), strict=True))
        return Item("audio", key, lambda: inputs, seconds, tuple(warnings))

    def _need_vision(self, what: str) -> VisionInfo:
        if self._vision is None:
            raise self._lacks("vision", what)
        return self._vision

    def _lacks(self, modality: str, what: str) -> MediaError:
        return MediaError(
            f"The prompt contains {what}, but this artifact has no {modality} encoder (it takes "
            f"{', '.join(self._modalities)}); export it again with --modalities "
            f"{','.join(self._modalities)},{modality}."
        )


def _image_size(vision: VisionInfo, options: MediaOptions, detail: str | None) -> int:
    if options.image_size is None:
        return DETAILS[detail](vision.image_sizes) if detail in DETAILS else vision.default_image_size
    if options.image_size not in vision.image_sizes:
        raise OptionError(
            f"image_size is {options.image_size}; the encoder takes {', '.join(map(str, vision.image_sizes))}.",
            option="image_size",
        )
    return options.image_size
