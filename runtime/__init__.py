"""Gemma 3n on ONNX Runtime. Self-contained: imports neither the exporter nor torch. A name is imported when it is first
used, so that the command line starts fast."""

import importlib

TYPE_CHECKING = False  # type checkers know it by its name; importing typing would take longer than all else here
if TYPE_CHECKING:
    from .errors import (
        AnswerSchemaError,
        ArtifactError,
        ArtifactNotFoundError,
        AudioTooLongError,
        ChatTemplateError,
        ClosedError,
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
    from .generation.logprobs import TokenLogprob, TopToken
    from .generation.options import GenerationOptions
    from .generation.result import GenerationResult, Timings
    from .media.fetch import FetchPolicy
    from .media.reader import MediaOptions
    from .model import OnnxGemma3n
else:
    _HOMES = {
        "generation.logprobs": ("TokenLogprob", "TopToken"),
        "generation.options": ("GenerationOptions",),
        "generation.result": ("GenerationResult", "Timings"),
        "media.fetch": ("FetchPolicy",),
        "media.reader": ("MediaOptions",),
        "model": ("OnnxGemma3n",),
    }
    _HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{_HOME_OF.get(name, 'errors')}", __name__), name)


__all__ = [
    "AnswerSchemaError",
    "ArtifactError",
    "ArtifactNotFoundError",
    "AudioTooLongError",
    "ChatTemplateError",
    "ClosedError",
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
    "TopToken",
    "UrlRefusedError",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
