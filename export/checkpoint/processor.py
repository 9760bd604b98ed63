"""Image and audio preprocessing settings, from a checkpoint's processor files."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

from gemma3n_onnx.export.errors import CheckpointError
from gemma3n_onnx.runtime.artifact import LogMelInfo, SoftTokens
from gemma3n_onnx.runtime.errors import shown

from .checkpoint import ENCODER_MODULES, TOKENIZER, Checkpoint

IMAGE_SIZES = (256, 512, 768)
BILINEAR = 2  # Pillow's Resampling.BILINEAR

# Gemma 3n's values, for checkpoints without processor files; audio from transformers' Gemma3nAudioFeatureExtractor.
_IMAGE = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": False, "resample": BILINEAR, "do_resize": True}
_AUDIO = {
    "sampling_rate": 16_000,
    "frame_length_ms": 32.0,
    "hop_length_ms": 10.0,
    "feature_size": 128,
    "min_frequency": 125.0,
    "max_frequency": 7600.0,
    "preemphasis": 0.97,
    "preemphasis_htk_flavor": True,
    "fft_overdrive": True,
    "dither": 0.0,
    "input_scale_factor": 1.0,
    "mel_floor": 1e-5,
    "per_bin_mean": None,
    "per_bin_stddev": None,
}
# Settings for which only the default is implemented.
_FIXED_IMAGE = ("do_rescale", "do_normalize", "resample", "do_resize")
_FIXED_AUDIO = ("preemphasis_htk_flavor", "dither", "input_scale_factor", "per_bin_mean", "per_bin_stddev")
MAX_SECONDS, PAD_MULTIPLE = 30, 128  # defaults of the extractor's `__call__`, which are in no file


@dataclass(frozen=True)
class FrontEnds:
    """Soft tokens and preprocessing of the exported modalities; None for a modality that is not exported."""

    soft_tokens: Mapping[str, SoftTokens]
    image: ImageSettings | None
    log_mel: LogMelInfo | None


@dataclass(frozen=True)
class ImageSettings:
    """The side in pixels to which the processor resizes images, and the factor for pixel values."""

    size: int
    rescale: float


def read_front_ends(checkpoint: Checkpoint, modalities: Collection[str]) -> FrontEnds:
    """Raises CheckpointError for an unsupported processor setting or a missing soft token."""
    return FrontEnds(
        soft_tokens={m: soft_tokens(checkpoint, m) for m in modalities if m in ENCODER_MODULES},
        image=image_settings(checkpoint) if "vision" in modalities else None,
        log_mel=log_mel_settings(checkpoint) if "audio" in modalities else None,
    )


def image_settings(checkpoint: Checkpoint) -> ImageSettings:
    """Raises CheckpointError for an unsupported setting of the image processor."""
    settings = _settings(checkpoint, "image_processor", _IMAGE, _FIXED_IMAGE)
    size = settings.get("size") or {"height": IMAGE_SIZES[-1], "width": IMAGE_SIZES[-1]}
    sides = [size.get("height"), size.get("width")] if isinstance(size, Mapping) else []
    chosen = next((side for side in IMAGE_SIZES if sides == [side, side]), None)
    if chosen is None:
        raise CheckpointError(
            f"The image processor's size is {shown(size)}; supported are squares of "
            f"{', '.join(map(str, IMAGE_SIZES))} pixels."
        )
    rescale = settings["rescale_factor"]
    if not isinstance(rescale, int | float) or not 0 < rescale <= 1:
        raise CheckpointError(f"The image processor's rescale_factor is {shown(rescale)}; it must be from 0 to 1.")
    return ImageSettings(chosen, float(rescale))


def log_mel_settings(checkpoint: Checkpoint) -> LogMelInfo:
    """Raises CheckpointError for an unsupported setting of the feature extractor."""
    settings = _settings(checkpoint, "feature_extractor", _AUDIO, _FIXED_AUDIO)
    try:
        return log_mel_info(settings)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"A value of the feature extractor cannot be used ({error}); download the checkpoint again."
        ) from error


def log_mel_info(settings: Mapping[str, Any]) -> LogMelInfo:
    """The log-mel parameters of a feature extractor.

    Raises:
        TypeError, ValueError, OverflowError: a value has the wrong type, or is out of range.
    """
    rate = int(settings["sampling_rate"])
    frame = int(settings.get("frame_length") or round(rate * settings["frame_length_ms"] / 1000))
    hop = int(settings.get("hop_length") or round(rate * settings["hop_length_ms"] / 1000))
    fft = 2 ** (math.ceil(math.log2(frame)) + bool(settings["fft_overdrive"]))
    return LogMelInfo(
        sample_rate_hz=rate,
        frame_length=frame,
        hop_length=hop,
        fft_length=fft,
        mel_bins=int(settings["feature_size"]),
        min_frequency_hz=float(settings["min_frequency"]),
        max_frequency_hz=float(settings["max_frequency"]),
        preemphasis=float(settings["preemphasis"]),
        mel_floor=float(settings["mel_floor"]),
        max_samples=MAX_SECONDS * rate,
        pad_multiple=PAD_MULTIPLE,
    )


def soft_tokens(checkpoint: Checkpoint, modality: str) -> SoftTokens:
    """The soft tokens of an image or a clip, as the processor writes them into the prompt.

    Raises:
        CheckpointError: config.json lacks a token id, the vocabulary has no such id, or the tokenizer lacks the token.
    """
    keys = {
        "vision": ("image_token_id", "boi_token_id", "eoi_token_id", "vision_soft_tokens_per_image"),
        "audio": ("audio_token_id", "boa_token_id", "eoa_token_id", "audio_soft_tokens_per_image"),
    }[modality]
    values = [_positive(checkpoint, key) for key in keys]
    vocab = checkpoint.text_config.vocab_size
    for key, token_id in zip(keys, values[:3]):
        if token_id >= vocab:
            raise CheckpointError(
                f"{key} is {token_id:,}, but the vocabulary has {vocab:,} ids; leave {modality} out with --modalities, "
                "or save the model with enough token embeddings."
            )
    backend = tokenizers.Tokenizer.from_file(str(checkpoint.folder / TOKENIZER))
    soft, start, end = (_token(backend, key, token_id) for key, token_id in zip(keys, values[:3]))
    try:
        return SoftTokens(token=soft, token_id=values[0], count=values[3], prefix=f"\n\n{start}", suffix=f"{end}\n\n")
    except ValueError as error:
        raise CheckpointError(f"The soft tokens of {modality}: {error}; download config.json again.") from error


def _positive(checkpoint: Checkpoint, key: str) -> int:
    value = checkpoint.config.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"config.json has {shown(value)} for {key}; download the checkpoint again.")
    return value


def _token(backend: tokenizers.Tokenizer, key: str, token_id: int) -> str:
    token = backend.id_to_token(token_id)
    if token is None:
        raise CheckpointError(f"The tokenizer has no token {token_id}, the {key}; download the checkpoint again.")
    return token


def _settings(checkpoint: Checkpoint, part: str, defaults: Mapping[str, Any], fixed: Collection[str]) -> dict[str, Any]:
    """The defaults, overridden by `part` of processor_config.json or by the flat preprocessor_config.json."""
    found = checkpoint.processor_config(part)
    settings = {**defaults, **{key: value for key, value in found.items() if value is not None}}
    for key in fixed:
        if settings[key] != (wanted := defaults[key]):
            raise CheckpointError(
                f"The {part.replace('_', ' ')} of the checkpoint has {key} {shown(settings[key])}; only {wanted!r} is "
                "implemented."
            )
    return settings
