"""Keyword options of `generate`, `stream`, `chat` and `log_likelihood`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import OptionError
from .generation.options import GenerationOptions
from .media.reader import MediaOptions


def read_options(options: Mapping[str, Any]) -> tuple[GenerationOptions, MediaOptions]:
    """Raises OptionError for an unknown option or a bad value."""
    kinds = (GenerationOptions, MediaOptions)
    _require_known(options, kinds)
    generation, media = ({k: v for k, v in options.items() if k in kind.__dataclass_fields__} for kind in kinds)
    return GenerationOptions(**generation), MediaOptions(**media)


def read_media_options(options: Mapping[str, Any]) -> MediaOptions:
    """Raises OptionError for an unknown option or a bad value."""
    _require_known(options, (MediaOptions,))
    return MediaOptions(**options)


def _require_known(options: Mapping[str, Any], kinds: Sequence[type[GenerationOptions | MediaOptions]]) -> None:
    known = [name for kind in kinds for name in kind.__dataclass_fields__]
    if unknown := sorted(options.keys() - set(known)):
        raise OptionError(f"Unknown option {unknown[0]!r}; use one of {', '.join(known)}.")
