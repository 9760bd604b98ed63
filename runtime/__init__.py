"""Gemma 3n on ONNX Runtime. Stands alone on a device: imports nothing of the exporter, and no torch."""

from .errors import (
    ArtifactError,
    ArtifactNotFoundError,
    AudioTooLongError,
    ContextLengthError,
    Gemma3nError,
    MediaError,
    MediaNotFoundError,
    OptionError,
    PackageMissingError,
    PromptError,
    ProviderError,
    RuntimeMissingError,
    UrlRefusedError,
)
from .generation.logprobs import TokenLogprob
from .generation.options import GenerationOptions
from .generation.result import GenerationResult, Timings
from .media.fetch import FetchPolicy
from .media.reader import MediaOptions
from .model import OnnxGemma3n

__all__ = [
    "ArtifactError",
    "ArtifactNotFoundError",
    "AudioTooLongError",
    "ContextLengthError",
    "FetchPolicy",
    "Gemma3nError",
    "GenerationOptions",
    "GenerationResult",
    "MediaError",
    "MediaNotFoundError",
    "MediaOptions",
    "OnnxGemma3n",
    "OptionError",
    "PackageMissingError",
    "PromptError",
    "ProviderError",
    "RuntimeMissingError",
    "Timings",
    "TokenLogprob",
    "UrlRefusedError",
]
