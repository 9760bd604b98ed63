"""The prompts of `gemma3n-export --report`, and the checks that need no torch."""

from __future__ import annotations

from pathlib import Path

from gemma3n_onnx.export.errors import ExportOptionError
from gemma3n_onnx.export.options import ExportOptions
from gemma3n_onnx.export.quantization.recipes import precision_for

PROMPTS = (
    "What is 12 plus 7?",
    "Count from 3 to 8.",
    "Repeat: river stone lamp window",
    "Why is the sky blue, and why does it turn red in the evening?",
    "Write a function in Python that returns the n-th Fibonacci number.",
    "Translate into French: The train leaves at seven, and nobody has a ticket.",
    "The old lighthouse keeper wrote down the weather every night, even when there was nothing to see but fog.",
    "List three differences between a fjord and a canyon.",
)


def check_report(report: Path, prompts: Path | None, options: ExportOptions) -> tuple[str, ...]:
    """The prompts of the report; checks its options before the export starts.

    Raises:
        ExportOptionError: the precision is not quantized, the report's folder does not exist, or the prompts cannot
            be read.
    """
    if precision_for(options.precision_name, options.target).weights is None:
        raise ExportOptionError(f"--report needs a quantized --precision, not {options.precision_name}.")
    if not report.parent.is_dir() or report.is_dir():
        raise ExportOptionError(f"{report} cannot be written; give a file in an existing folder.")
    if prompts is None:
        return PROMPTS
    try:
        lines = tuple(line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ExportOptionError(f"{prompts} cannot be read as text ({error}); give a file of prompts.") from error
    if not lines:
        raise ExportOptionError(f"{prompts} has no prompts; give one per line.")
    return lines
