"""`gemma3n slices`: the table of MatFormer slices."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from .options import table_option


@click.command()
@table_option
@click.option("--model", help="List the slices of this checkpoint (a folder, a Hub id or demo) instead of E4B.")
@click.option("--json", "as_json", is_flag=True)
def slices(table: Path | None, model: str | None, as_json: bool) -> None:
    """List the MatFormer slices with their parameters and sizes."""
    from gemma3n_onnx.export.checkpoint.sizes import E4B, E4B_CONFIG, render_table, slices_table
    from gemma3n_onnx.export.errors import SliceError
    from gemma3n_onnx.export.slicing import load_slices

    loaded = load_slices(table)  # before a download
    if model is None:
        rows = slices_table(E4B, E4B_CONFIG, loaded.specs)
    else:
        from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(model)
        loaded = load_slices(table, checkpoint.slice_table)
        rows = slices_table(checkpoint.text_config, checkpoint.config, loaded.specs)
    if not rows:
        raise SliceError(f"No slice of {loaded.source} can be cut from {model or 'E4B'}; give another.")
    click.echo(json.dumps([asdict(row) for row in rows], indent=2) if as_json else render_table(rows))
