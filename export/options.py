"""The options of an export."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from gemma3n_onnx.graphs.config import Logits
from gemma3n_onnx.runtime.prompt.chat_template import ChatTemplate

from .checkpoint.checkpoint import ENCODER_MODULES
from .errors import ExportOptionError
from .layouts.base import Requested
from .layouts.select import DEFAULT, layout_named
from .quantization.options import QuantizationOptions
from .quantization.recipes import default_precision, precision_for
from .slicing import find_slice, load_slices

LOGITS: tuple[str, ...] = get_args(Logits)
MODALITIES = ("text", *ENCODER_MODULES)


@dataclass(frozen=True)
class ExportOptions:
    slice: str | None = None
    """None for the whole checkpoint."""
    matformer_config: Path | None = None
    precision: str | None = None
    """None for the target's default."""
    quantization: QuantizationOptions = field(default_factory=QuantizationOptions)
    target: str = "cpu"
    logits: Logits = "last"
    modalities: tuple[str, ...] | None = None
    """None for all modalities that the layout and the checkpoint have. Text is always exported."""
    layout: str = DEFAULT
    chat_template: Path | None = None
    """A Jinja file; None for the checkpoint's template, if it has one."""
    force: bool = False

    @property
    def precision_name(self) -> str:
        return self.precision or default_precision(self.target)


def check_options(options: ExportOptions) -> None:
    """Checks everything that does not need the checkpoint, so that errors come before a download.

    A checkpoint may have its own slice table, so slices are checked only if the options name a table.

    Raises:
        ExportOptionError: an unknown value, or a slice table without a slice.
        SliceError: the table breaks a rule, or the slice is not in it.
        ChatTemplateError: the chat template cannot be read or compiled.
    """
    precision_for(options.precision_name, options.target, options.quantization)
    requested = Requested(options.precision_name, options.target, options.logits, options.modalities)
    layout_named(options.layout).check(requested)
    if options.logits not in LOGITS:
        raise ExportOptionError(f"Unknown logits {options.logits!r}; choose {' or '.join(LOGITS)}.")
    if unknown := sorted(set(options.modalities or ()) - set(MODALITIES)):
        raise ExportOptionError(f"Unknown modality {unknown[0]!r}; choose from {', '.join(MODALITIES)}.")
    if options.chat_template is not None:
        ChatTemplate.from_file(options.chat_template)
    if options.matformer_config is not None:
        if options.slice is None:
            raise ExportOptionError("--matformer-config needs --slice with one of its slices.")
        find_slice(options.slice, load_slices(options.matformer_config))
