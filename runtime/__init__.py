"""Gemma 3n on ONNX Runtime. Stands alone on a device: imports nothing of the exporter, and no torch."""

from .answer import GenerationResult
from .errors import (
    ArtifactError,
    ArtifactNotFoundError,
    ContextLengthError,
    Gemma3nError,
    OptionError,
    PromptError,
    ProviderError,
    RuntimeMissingError,
)
from .generation import Timings
from .model import OnnxGemma3n
from .sampling import GenerationOptions, TokenLogprob

__all__ = [
    "ArtifactError",
    "ArtifactNotFoundError",
    "ContextLengthError",
    "Gemma3nError",
    "GenerationOptions",
    "GenerationResult",
    "OnnxGemma3n",
    "OptionError",
    "PromptError",
    "ProviderError",
    "RuntimeMissingError",
    "Timings",
    "TokenLogprob",
]
