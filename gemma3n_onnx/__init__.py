"""Gemma 3n on ONNX Runtime: the names of `gemma3n_onnx.runtime`, which is imported when the first of them is used."""

import os

TYPE_CHECKING = False  # type checkers know it by its name; importing typing would take longer than all else here
if TYPE_CHECKING:
    from gemma3n_onnx.runtime import (
        AnswerSchemaError,
        ArtifactError,
        ArtifactNotFoundError,
        AudioTooLongError,
        ChatTemplateError,
        ClosedError,
        ContextLengthError,
        FetchPolicy,
        Gemma3nError,
        GenerationOptions,
        GenerationResult,
        MediaError,
        MediaNotFoundError,
        MediaOptions,
        OnnxGemma3n,
        OptionError,
        PackageMissingError,
        PromptError,
        ProviderError,
        RuntimeMissingError,
        Timings,
        TokenLogprob,
        TopToken,
        UrlRefusedError,
    )

    __version__: str
else:

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version

            return version("gemma3n-onnx")
        if name in __all__:
            from gemma3n_onnx import runtime

            return getattr(runtime, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    "__version__",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# A wheel has the subpackages in this folder; in a clone they are folders beside it.
if not os.path.isdir(os.path.join(__path__[0], "runtime")):
    __path__.append(os.path.dirname(__path__[0]))
