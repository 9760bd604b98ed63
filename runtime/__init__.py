"""Gemma 3n on ONNX Runtime. Self-contained: imports neither the exporter nor torch."""

from .errors import (
    ArtifactError,
    ArtifactNotFoundError,
    AudioTooLongError,
    ChatTemplateError,
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
    "ChatTemplateError",
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
