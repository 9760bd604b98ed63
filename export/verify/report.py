"""`gemma3n-export --report`: the sensitivity of a decoder to the quantization of each of its tensors."""

from __future__ import annotations

import json
from pathlib import Path

from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.export.errors import ExportOptionError
from gemma3n_onnx.export.options import ExportOptions
from gemma3n_onnx.export.pipeline import ExportSummary
from gemma3n_onnx.export.plan import choose_slice
from gemma3n_onnx.export.progress import TerminalProgress
from gemma3n_onnx.export.quantization.recipes import precision_for
from gemma3n_onnx.export.quantization.sensitivity import Report, sensitivities
from gemma3n_onnx.runtime.errors import PromptError
from gemma3n_onnx.runtime.prompt.chat_template import ChatTemplate
from gemma3n_onnx.runtime.prompt.tokenizer import Tokenizer

from .reference import check_transformers, stored_in

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
_SHOWN = 10


def check_report(report: Path, prompts: Path | None, options: ExportOptions) -> tuple[str, ...]:
    """The prompts of the report; checks its options before the export starts.

    Raises:
        ExportOptionError: the precision is not quantized, the report's folder does not exist, or the prompts cannot
            be read.
        ExportError: transformers, which runs the decoder, cannot be imported.
    """
    if precision_for(options.precision, options.target).weights is None:
        raise ExportOptionError(f"--report needs a quantized --precision, not {options.precision}.")
    if not report.parent.is_dir() or report.is_dir():
        raise ExportOptionError(f"{report} cannot be written; give a file in an existing folder.")
    check_transformers()
    if prompts is None:
        return PROMPTS
    try:
        lines = tuple(line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ExportOptionError(f"{prompts} cannot be read as text ({error}); give a file of prompts.") from error
    if not lines:
        raise ExportOptionError(f"{prompts} has no prompts; give one per line.")
    return lines


def measure(
    checkpoint: Checkpoint,
    options: ExportOptions,
    summary: ExportSummary,
    lines: tuple[str, ...],
    progress: TerminalProgress,
) -> Report:
    """Raises ExportError if transformers cannot build the decoder, PromptError if a prompt has no tokens."""
    progress.stage("Measuring the sensitivity of each tensor")
    chosen = choose_slice(checkpoint, options.slice, options.matformer_config)
    tokenizer = Tokenizer.from_folder(summary.folder)
    template = checkpoint.chat_template()
    asked = lines
    if template is not None:
        chat = ChatTemplate(template)
        asked = tuple(chat.render([{"role": "user", "content": line}]) for line in lines)
    prompts = [tokenizer.encode(text, add_bos=True) for text in asked]
    if not all(prompts):
        raise PromptError("A report prompt has no tokens; give text.")
    storage_of = stored_in(summary.manifest)
    return sensitivities(checkpoint, chosen, options.precision, storage_of, prompts, progress.steps)


def write_report(path: Path, report: Report) -> None:
    path.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")


def describe_report(report: Report) -> str:
    lines = [
        f"KL divergence over {report.positions} positions, all tensors quantized: {report.kl_all:.2e} nats; one tensor:"
    ]
    lines += [f"  {tensor.kl:.2e}  error {tensor.error:.2%}  {tensor.name}" for tensor in report.tensors[:_SHOWN]]
    if (left := len(report.tensors) - _SHOWN) > 0:
        lines.append(f"  and {left} more tensors of lower KL")
    return "\n".join(lines)
