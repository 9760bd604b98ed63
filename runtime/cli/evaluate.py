"""`gemma3n evaluate`: benchmarks of lm-evaluation-harness."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from gemma3n_onnx.runtime.artifact import load_manifest
from gemma3n_onnx.runtime.errors import OptionError
from gemma3n_onnx.runtime.hub import find_artifact
from gemma3n_onnx.runtime.model import OnnxGemma3n

from .options import load_options


@click.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--tasks", required=True, help="Names of tasks or groups, separated by commas, as for lm_eval.")
@click.option("--include-path", type=click.Path(exists=True, file_okay=False), help="A folder with tasks of your own.")
@click.option("--num-fewshot", type=click.IntRange(0), help="Examples in the prompt. Default: the task's own.")
@click.option("--limit", type=float, help="Items of each task, or a share of them below 1; for a quick look.")
@click.option(
    "--max-length", type=click.IntRange(2), default=2048, show_default=True, help="Tokens of prompt and answer."
)
@click.option("--apply-chat-template", is_flag=True, help="Make each prompt a user message.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="Save results and samples here.")
@load_options
@click.option("--json", "as_json", is_flag=True)
def evaluate(
    artifacts: tuple[Path, ...],
    tasks: str,
    include_path: str | None,
    num_fewshot: int | None,
    limit: float | None,
    max_length: int,
    apply_chat_template: bool,
    output: Path | None,
    load: dict[str, Any],
    as_json: bool,
) -> None:
    """Run tasks of lm-evaluation-harness on the folders or Hub ids ARTIFACTS, to compare slices and precisions."""
    folders = [find_artifact(artifact) for artifact in artifacts]
    for folder in folders:
        if (context := load_manifest(folder).max_context) < max_length:
            raise OptionError(
                f"--max-length {max_length} exceeds the context of {folder}, {context:,} tokens; use less."
            )
    from gemma3n_onnx.runtime.evaluation.harness import run_tasks, table

    wanted = [name.strip() for name in tasks.split(",") if name.strip()]
    quiet = not sys.stderr.isatty()
    found = {}
    for folder in folders:
        model = OnnxGemma3n.from_pretrained(folder, prefix_cache_size=0, **load)
        found[str(folder)] = run_tasks(
            model,
            wanted,
            include_path=include_path,
            num_fewshot=num_fewshot,
            limit=limit,
            max_length=max_length,
            chat=apply_chat_template,
            output=None if output is None else output / folder.resolve().name,
            quiet=quiet,
        )
        if not as_json:
            click.echo(f"{folder}\n{table(found[str(folder)])}")
    if as_json:
        click.echo(json.dumps({folder: each["results"] for folder, each in found.items()}, indent=2))
