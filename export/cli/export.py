"""`gemma3n-export`: a checkpoint to an artifact."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma3n_onnx.export.layouts.select import DEFAULT, LAYOUTS, artifact_kind
from gemma3n_onnx.export.quantization.config import BLOCKS, METHODS
from gemma3n_onnx.export.quantization.options import PREFILLS, TABLE_BITS, QuantizationOptions
from gemma3n_onnx.export.quantization.recipes import DEFAULTS, RECIPES, TARGETS
from gemma3n_onnx.runtime.system import peak_memory_bytes

from .options import (
    PATH,
    force_option,
    known,
    model_option,
    revision_option,
    slice_option,
    split_modalities,
    table_option,
)

if TYPE_CHECKING:
    from gemma3n_onnx.export.pipeline import ExportSummary
    from gemma3n_onnx.graphs.config import Logits

NO_TEMPLATE = (
    "Warning: the checkpoint has no chat template, so the artifact will take text prompts but no messages; "
    "give a template with --chat-template FILE."
)


@click.command("export")
@model_option
@revision_option
@slice_option
@table_option
@click.option(
    "--precision",
    help=f"{known(RECIPES)}. [default: {', '.join(f'{name} for {target}' for target, name in DEFAULTS.items())}]",
)
@click.option("--block-size", type=int, help=f"Block size of a quantized precision: {known(BLOCKS)}.")
@click.option("--quantizer", help=f"Quantization method of the projections: {known(METHODS)}.")
@click.option("--embedding-bits", type=int, help=f"Bits of token embeddings and output head: {known(TABLE_BITS)}.")
@click.option("--ple-bits", type=int, help=f"Bits of the per-layer embeddings: {known(TABLE_BITS)}.")
@click.option("--prefill", help=f"Prefill in an int8 graph, or in the decoder: {known(PREFILLS)}. [default: int8]")
@click.option("--target", default="cpu", show_default=True, help=f"{' or '.join(TARGETS)}.")
@click.option(
    "--logits",
    type=click.Choice(["last", "all"]),
    default="last",
    show_default=True,
    help="Logits of the last position, or of all positions (for evaluation).",
)
@click.option("--modalities", help="Comma-separated: text,vision,audio; by default all of the checkpoint's.")
@click.option("--layout", default=DEFAULT, show_default=True, help=f"The consumer of the artifact: {known(LAYOUTS)}.")
@click.option("--chat-template", type=PATH, help="A Jinja file to use instead of the checkpoint's chat template.")
@click.option("--output", type=PATH, help="The output folder; by default named after model and slice.")
@click.option("--report", type=PATH, help="Write the cost of quantizing each tensor alone to this JSON file.")
@click.option("--report-prompts", type=PATH, help="A file with the prompts of the report, one a line.")
@force_option
@click.option("--quiet", is_flag=True, help="Print neither progress nor a summary.")
@click.version_option(package_name="gemma3n-onnx")
def export_command(
    model: str,
    revision: str | None,
    slice_name: str | None,
    table: Path | None,
    precision: str | None,
    block_size: int | None,
    quantizer: str | None,
    embedding_bits: int | None,
    ple_bits: int | None,
    prefill: str | None,
    target: str,
    logits: Logits,
    modalities: str | None,
    layout: str,
    chat_template: Path | None,
    output: Path | None,
    report: Path | None,
    report_prompts: Path | None,
    force: bool,
    quiet: bool,
) -> None:
    """Export a Gemma 3n checkpoint, or a MatFormer slice of it, to ONNX Runtime."""
    from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
    from gemma3n_onnx.export.errors import ExportOptionError
    from gemma3n_onnx.export.options import ExportOptions, check_options
    from gemma3n_onnx.export.slicing import choose_slice
    from gemma3n_onnx.export.verify.report_prompts import check_report
    from gemma3n_onnx.export.writer import check_output

    options = ExportOptions(
        slice=slice_name,
        matformer_config=table,
        precision=precision,
        quantization=QuantizationOptions(
            block=block_size, method=quantizer, embedding_bits=embedding_bits, ple_bits=ple_bits, prefill=prefill
        ),
        target=target,
        logits=logits,
        modalities=None if modalities is None else split_modalities(modalities),
        layout=layout,
        chat_template=chat_template,
        force=force,
    )
    check_options(options)
    if report_prompts is not None and report is None:
        raise ExportOptionError("--report-prompts needs --report with the file to write.")
    lines = None if report is None else check_report(report, report_prompts, options)
    if output is not None:
        check_output(output, force=force, kind=artifact_kind())  # before a download
    checkpoint = Checkpoint.open(model, revision)
    choose_slice(checkpoint, slice_name, table)

    # These take seconds to import, so they come after the checks.
    from gemma3n_onnx.export.pipeline import export
    from gemma3n_onnx.export.progress import TerminalProgress
    from gemma3n_onnx.export.verify.reference import check_transformers
    from gemma3n_onnx.export.verify.report import describe_report, measure, write_report

    if report is not None:
        check_transformers()
    if chat_template is None and checkpoint.chat_template() is None:
        click.echo(NO_TEMPLATE, err=True)
    parts = (checkpoint.name, slice_name or "whole", options.precision_name, target)
    target_folder = output or Path(_folder_name(*parts))
    with TerminalProgress(quiet) as progress:
        summary = export(checkpoint, target_folder, options, progress)
        found = None if lines is None else measure(checkpoint, options, summary, lines, progress)
    if not quiet:
        click.echo(describe_export(summary))
    if report is not None and found is not None:
        write_report(report, found)
        if not quiet:
            click.echo(describe_report(found))


def _folder_name(*parts: str) -> str:
    return "-".join(re.sub(r"[^\w.]+", "-", part).strip("-.") for part in parts)


def describe_export(summary: ExportSummary) -> str:
    manifest = summary.manifest
    files = {name: info.bytes for name, info in manifest.files.items()}
    memory = peak_memory_bytes()
    largest = sorted(files, key=lambda name: -files[name])[:4]
    total = sum(files.values())
    unit, scale = ("MB", 1e6) if total < 1e9 else ("GB", 1e9)
    return "\n".join(
        [
            f"Exported {manifest.slice} of {manifest.source} to {summary.folder}",
            f"  {manifest.num_layers} layers, {manifest.parameters.text:,} text parameters, "
            f"{manifest.parameters.effective:,} effective; modalities: {', '.join(manifest.modalities)}",
            f"  {manifest.precision} for {manifest.target}, {total / scale:.2f} {unit} in {len(files)} files",
            *(f"  {files[name] / scale:>9.3f} {unit}  {name}" for name in largest),
            f"  {summary.seconds:.0f} s, peak memory " + ("unknown" if memory is None else f"{memory / 2**30:.2f} GiB"),
        ]
    )
