"""`gemma3n bench`: speed and memory."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from gemma3n_onnx.runtime.hub import find_artifact

from .options import load_options


@click.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--prompt-tokens", default=1024, show_default=True)
@click.option("--new-tokens", default=256, show_default=True)
@click.option("--context", default=4096, show_default=True, help="KV cache capacity, in tokens.")
@click.option("--runs", default=3, show_default=True, help="Report medians of this many runs.")
@load_options
@click.option("--json", "as_json", is_flag=True)
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Plot speed, memory and MMLU to this PNG.")
def bench(
    artifacts: tuple[Path, ...],
    prompt_tokens: int,
    new_tokens: int,
    context: int,
    runs: int,
    load: dict[str, Any],
    as_json: bool,
    plot_file: Path | None,
) -> None:
    """Measure speed and memory of the folders or Hub ids ARTIFACTS, each in its own process."""
    from .measure import Sizes, measure_apart, plot, table

    sizes = Sizes(prompt_tokens, new_tokens, context)
    show = sys.stderr.isatty()
    with click.progressbar(artifacts, label="Measuring", file=sys.stderr, hidden=not show) as bar:
        figures = [measure_apart(find_artifact(artifact), sizes, runs, load) for artifact in bar]
    if plot_file is not None:
        plot(figures, plot_file)
    everything = [asdict(each) | {"decode_limit": each.decode_limit} for each in figures]
    click.echo(json.dumps(everything, indent=2) if as_json else table(figures))
