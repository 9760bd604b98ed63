"""The `gemma3n-export` command, and the subcommands of `gemma3n` that need torch.

Commands import torch and transformers when they run: `--help` is instant, and a missing package is one sentence.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma3n_onnx.runtime.cli.exit import exit_with_message
from gemma3n_onnx.runtime.system import peak_memory_bytes

from .layouts.select import DEFAULT, LAYOUTS, artifact_kind
from .quantization.config import BLOCKS, METHODS
from .quantization.options import PREFILLS, TABLE_BITS, QuantizationOptions
from .quantization.recipes import RECIPES, TARGETS

if TYPE_CHECKING:
    from gemma3n_onnx.graphs.decoder import Logits

    from .checkpoint.make_checkpoint import Size
    from .pipeline import ExportSummary


def _known(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


_PATH = click.Path(path_type=Path)
_model = click.option(
    "--model", required=True, help="A checkpoint folder, a Hub id (org/name), or demo, this project's small one."
)
_revision = click.option("--revision", help="Branch, tag or commit of a Hub id.")
_table = click.option(
    "--matformer-config",
    "--matformer-config-path",
    "table",
    type=_PATH,
    help="A CSV of slices, instead of the checkpoint's slices.csv or the published slices.",
)
_slice = click.option(
    "--slice",
    "--matformer-slice-name",
    "slice_name",
    help="A MatFormer slice: E2B, E4B, E2.49B, E2.98B-layer, ... (see `gemma3n slices`), or a slice of the CSV or of "
    "the checkpoint's slices.csv.",
)
_force = click.option("--force", is_flag=True, help="Replace the output if it exists.")


@click.command()
@_model
@_revision
@_slice
@_table
@click.option("--precision", default="fp32", show_default=True, help=f"{_known(RECIPES)}.")
@click.option("--block-size", type=int, help=f"Block size of a quantized precision: {_known(BLOCKS)}.")
@click.option("--quantizer", help=f"Quantization method of the projections: {_known(METHODS)}.")
@click.option("--embedding-bits", type=int, help=f"Bits of token embeddings and output head: {_known(TABLE_BITS)}.")
@click.option("--ple-bits", type=int, help=f"Bits of the per-layer embeddings: {_known(TABLE_BITS)}.")
@click.option("--prefill", help=f"Prefill in an int8 graph, or in the decoder: {_known(PREFILLS)}. [default: int8]")
@click.option("--target", default="cpu", show_default=True, help=f"{' or '.join(TARGETS)}.")
@click.option(
    "--logits",
    type=click.Choice(["last", "all"]),
    default="last",
    show_default=True,
    help="Logits of the last position, or of all positions (for evaluation).",
)
@click.option("--modalities", help="Comma-separated: text,vision,audio; by default all of the checkpoint's.")
@click.option("--layout", default=DEFAULT, show_default=True, help=f"The consumer of the artifact: {_known(LAYOUTS)}.")
@click.option("--output", type=_PATH, help="The output folder; by default named after model and slice.")
@click.option("--report", type=_PATH, help="Write the cost of quantizing each tensor alone to this JSON file.")
@click.option("--report-prompts", type=_PATH, help="A file with the prompts of the report, one a line.")
@_force
@click.option("--quiet", is_flag=True, help="Print neither progress nor a summary.")
@click.version_option(package_name="gemma3n-onnx")
def export_command(
    model: str,
    revision: str | None,
    slice_name: str | None,
    table: Path | None,
    precision: str,
    block_size: int | None,
    quantizer: str | None,
    embedding_bits: int | None,
    ple_bits: int | None,
    prefill: str | None,
    target: str,
    logits: Logits,
    modalities: str | None,
    layout: str,
    output: Path | None,
    report: Path | None,
    report_prompts: Path | None,
    force: bool,
    quiet: bool,
) -> None:
    """Export a Gemma 3n checkpoint, or a MatFormer slice of it, to ONNX Runtime."""
    from .checkpoint.checkpoint import Checkpoint
    from .options import ExportOptions, check_options
    from .pipeline import export
    from .progress import TerminalProgress
    from .verify.report import check_report, describe_report, measure, write_report
    from .writer import check_output

    options = ExportOptions(
        slice=slice_name,
        matformer_config=table,
        precision=precision,
        quantization=QuantizationOptions(
            block=block_size, method=quantizer, embedding_bits=embedding_bits, ple_bits=ple_bits, prefill=prefill
        ),
        target=target,
        logits=logits,
        modalities=None if modalities is None else _split(modalities),
        layout=layout,
        force=force,
    )
    check_options(options)
    lines = None if report is None else check_report(report, report_prompts, options)
    if output is not None:
        check_output(output, force=force, kind=artifact_kind())  # before a download
    checkpoint = Checkpoint.open(model, revision)
    target_folder = output or Path(_folder_name(checkpoint.name, slice_name or "whole", precision, target))
    with TerminalProgress(quiet) as progress:
        summary = export(checkpoint, target_folder, options, progress)
        found = None if lines is None else measure(checkpoint, options, summary, lines, progress)
    if not quiet:
        click.echo(describe_export(summary))
    if report is not None and found is not None:
        write_report(report, found)
        if not quiet:
            click.echo(describe_report(found))


def _split(modalities: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in modalities.split(",") if part.strip())


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


def main() -> None:
    exit_with_message(partial(export_command.main, prog_name="gemma3n-export", standalone_mode=False))


@click.command()
@click.option("--size", type=click.Choice(["tiny", "e2b", "e4b"]), required=True)
@click.option("--output", type=_PATH, required=True, help="The output folder.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--text-only", is_flag=True, help="Omit the vision and the audio encoder.")
@_force
def make_checkpoint(size: Size, output: Path, seed: int, text_only: bool, force: bool) -> None:
    """Write a checkpoint with random weights in Hugging Face format."""
    from .checkpoint.make_checkpoint import make_checkpoint as make
    from .progress import TerminalProgress

    with TerminalProgress() as progress:
        progress.stage("Writing random weights")
        done = 0

        def report(now: int, total: int) -> None:
            nonlocal done
            if done == 0:
                progress.bytes_total(total)
            progress.bytes_done(now - done)
            done = now

        make(size, output, seed, text_only=text_only, progress=report, force=force)
    click.echo(f"Wrote a {size} checkpoint to {output}")


@click.command()
@_table
@click.option("--model", help="List the slices of this checkpoint (a folder, a Hub id or demo) instead of E4B.")
@click.option("--json", "as_json", is_flag=True)
def slices(table: Path | None, model: str | None, as_json: bool) -> None:
    """List the MatFormer slices with their parameters and sizes."""
    from .checkpoint.checkpoint import Checkpoint
    from .checkpoint.sizes import E4B, E4B_CONFIG, render_table, slices_table
    from .errors import SliceError
    from .slicing import load_slices

    loaded = load_slices(table)  # before a download
    if model is None:
        rows = slices_table(E4B, E4B_CONFIG, loaded.specs)
    else:
        checkpoint = Checkpoint.open(model)
        loaded = load_slices(table, checkpoint.slice_table)
        rows = slices_table(checkpoint.text_config, checkpoint.config, loaded.specs)
    if not rows:
        raise SliceError(f"No slice of {loaded.source} can be cut from {model or 'E4B'}; give another.")
    click.echo(json.dumps([asdict(row) for row in rows], indent=2) if as_json else render_table(rows))


@click.command()
@click.argument("artifact", type=_PATH)
@_model
@_revision
@_slice
@_table
@click.option("--provider", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--prompts", default=2, show_default=True, type=click.IntRange(1))
@click.option("--prompt-tokens", type=click.IntRange(1), help="By default a little more than twice the sliding window.")
@click.option("--new-tokens", default=64, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the random inputs.")
@click.option("--modalities", help="Modalities to compare, comma-separated; by default all of the artifact's.")
@click.option("--json", "as_json", is_flag=True)
def verify(
    artifact: Path,
    model: str,
    revision: str | None,
    slice_name: str | None,
    table: Path | None,
    provider: str,
    prompts: int,
    prompt_tokens: int | None,
    new_tokens: int,
    seed: int,
    modalities: str | None,
    as_json: bool,
) -> None:
    """Compare ARTIFACT with transformers on the checkpoint that it was exported from.

    The decoder is always compared; transformers' vision encoder needs timm. The slice is the artifact's own unless
    --slice names another. Exits with 1 if parity fails.
    """
    from .verify.artifact import verify_artifact

    compared = verify_artifact(
        artifact,
        model,
        revision,
        slice_name,
        table,
        provider,
        prompts,
        prompt_tokens,
        new_tokens,
        seed,
        None if modalities is None else _split(modalities),
    )
    click.echo(json.dumps(compared.to_json(), indent=2) if as_json else compared.describe())
    if not compared.passed:
        sys.exit(1)
