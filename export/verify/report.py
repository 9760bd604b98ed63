"""`gemma3n-export --report`: the sensitivity of a decoder to the quantization of each of its tensors."""

from __future__ import annotations

import json
from pathlib import Path

from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.export.options import ExportOptions
from gemma3n_onnx.export.pipeline import ExportSummary
from gemma3n_onnx.export.progress import TerminalProgress
from gemma3n_onnx.export.quantization.sensitivity import Report, sensitivities
from gemma3n_onnx.export.slicing import choose_slice
from gemma3n_onnx.runtime.errors import PromptError
from gemma3n_onnx.runtime.prompt.chat_template import ChatTemplate
from gemma3n_onnx.runtime.prompt.tokenizer import Tokenizer

from .reference import stored_in

_SHOWN = 10


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
    return sensitivities(checkpoint, chosen, options.precision_name, storage_of, prompts, progress.steps)


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
