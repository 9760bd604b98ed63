"""`gemma3n make-checkpoint`: random weights under the real names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import PATH, force_option

if TYPE_CHECKING:
    from gemma3n_onnx.export.checkpoint.make_checkpoint import Size


@click.command()
@click.option("--size", type=click.Choice(["tiny", "e2b", "e4b"]), required=True)
@click.option("--output", type=PATH, required=True, help="The output folder.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--text-only", is_flag=True, help="Omit the vision and the audio encoder.")
@force_option
def make_checkpoint(size: Size, output: Path, seed: int, text_only: bool, force: bool) -> None:
    """Write a checkpoint with random weights in Hugging Face format."""
    from gemma3n_onnx.export.writer import CHECKPOINT, check_output

    check_output(output, force=force, kind=CHECKPOINT)

    # It takes seconds to import, so it comes after the check.
    from gemma3n_onnx.export.checkpoint.make_checkpoint import make_checkpoint as make
    from gemma3n_onnx.export.progress import TerminalProgress

    with TerminalProgress() as progress:
        progress.stage("Writing random weights")
        done = 0

        def report(now: int, total: int) -> None:
            nonlocal done
            if done == 0:
                progress.total(total)
            progress.done(now - done)
            done = now

        make(size, output, seed, text_only=text_only, progress=report, force=force)
    click.echo(f"Wrote a {size} checkpoint to {output}")
