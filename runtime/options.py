"""Keyword options of `generate`, `stream`, `chat` and `log_likelihood`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .constraints.options import ConstraintOptions, ConstraintReader
from .errors import OptionError
from .generation.defaults import SamplingDefaults
from .generation.options import GenerationOptions
from .media.reader import MediaOptions

GREEDY, DEFAULT = "greedy", "default"
SAMPLINGS = (GREEDY, DEFAULT)
_KINDS = (GenerationOptions, MediaOptions, ConstraintOptions)


class CallOptions(NamedTuple):
    """`check` raises AnswerSchemaError for a finished answer that it does not accept."""

    generation: GenerationOptions
    media: MediaOptions
    check: Callable[[str], None] | None


@dataclass(frozen=True)
class OptionReader:
    """Reads options for one model. `sampling="default"` takes the values that are not given from its checkpoint."""

    defaults: SamplingDefaults
    constraints: ConstraintReader

    def read(self, options: Mapping[str, Any]) -> CallOptions:
        """Raises OptionError for an unknown option or a bad value, PackageMissingError for a constraint without
        llguidance."""
        generation, media, wanted = split_options(options, self.defaults)
        constraint = self.constraints.read(wanted)
        if constraint is None:
            return CallOptions(generation, media, None)
        if generation.logits_processor is not None:
            raise OptionError(f"{wanted.given[0]} and logits_processor both constrain the answer; give one of them.")
        return CallOptions(replace(generation, logits_processor=constraint.processor), media, constraint.check)


def split_options(
    options: Mapping[str, Any], defaults: SamplingDefaults | None = None
) -> tuple[GenerationOptions, MediaOptions, ConstraintOptions]:
    """Checks all that needs no model. `defaults`: of the checkpoint, for `sampling="default"`.

    Raises:
        OptionError: an unknown option or a bad value.
    """
    given = dict(options)
    sampling = given.pop("sampling", GREEDY)
    if sampling not in SAMPLINGS:
        raise OptionError(f"sampling is {sampling!r}; choose {' or '.join(SAMPLINGS)}.", option="sampling")
    if sampling == DEFAULT and defaults is not None:
        given = defaults.under(given)
    _require_known(given, ["sampling", *(name for kind in _KINDS for name in kind.__dataclass_fields__)])
    generation, media, constraint = (
        {k: v for k, v in given.items() if k in kind.__dataclass_fields__} for kind in _KINDS
    )
    return GenerationOptions(**generation), MediaOptions(**media), ConstraintOptions(**constraint)


def read_media_options(options: Mapping[str, Any]) -> MediaOptions:
    """Raises OptionError for an unknown option or a bad value."""
    _require_known(options, [*MediaOptions.__dataclass_fields__])
    return MediaOptions(**options)


def _require_known(options: Mapping[str, Any], known: Sequence[str]) -> None:
    if unknown := sorted(options.keys() - set(known)):
        near = difflib.get_close_matches(unknown[0], known, 1)
        told = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}."
        raise OptionError(f"Unknown option {unknown[0]!r}; {told}")
