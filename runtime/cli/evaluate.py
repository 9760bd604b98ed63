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

from .options import FiniteRange, load_options

_LENGTH = 2048


@click.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--tasks", required=True, help="Names of tasks or groups, separated by commas, as for lm_eval.")
@click.option("--include-path", type=click.Path(exists=True, file_okay=False), help="A folder with tasks of your own.")
@click.option("--num-fewshot", type=click.IntRange(0), help="Examples in the prompt. Default: the task's own.")
@click.option(
    "--limit",
    type=FiniteRange(0, min_open=True),
    help="Items of each task, or a share of them below 1; for a quick look.",
)
@click.option(
    "--max-length", type=click.IntRange(2), help="Tokens of prompt and answer. Default: 2048, or the context if less."
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
    max_length: int | None,
    apply_chat_template: bool,
    output: Path | None,
    load: dict[str, Any],
    as_json: bool,
) -> None:
    """Run tasks of lm-evaluation-harness on the folders or Hub ids ARTIFACTS, to compare slices and precisions."""
    wanted = [name.strip() for name in tasks.split(",") if name.strip()]
    if not wanted:
        raise OptionError("--tasks names no task; list them with: lm_eval ls tasks.")
    outputs = [] if output is None else [output / artifact.resolve().name for artifact in artifacts]
    if same := [path.name for path in outputs if outputs.count(path) > 1]:
        raise OptionError(f"Results of artifacts of one name, {same[0]}, cannot be in one folder; evaluate them apart.")
    output_of = dict(zip(map(str, artifacts), outputs))
    folders = {str(artifact): find_artifact(artifact) for artifact in artifacts}
    contexts = {given: load_manifest(folder).max_context for given, folder in folders.items()}
    max_length = min(_LENGTH, *contexts.values()) if max_length is None else max_length
    for given, context in contexts.items():
        if context < max_length:
            raise OptionError(
                f"--max-length {max_length} exceeds the context of {given}, {context:,} tokens; use less."
            )
    from gemma3n_onnx.runtime.evaluation.harness import find_tasks, run_tasks, table

    manager = find_tasks(wanted, include_path)
    quiet = not sys.stderr.isatty()
    found = {}
    for given, folder in folders.items():
        model = OnnxGemma3n.from_pretrained(folder, prefix_cache_size=0, **load)
        found[given] = run_tasks(
            model,
            wanted,
            manager,
            num_fewshot=num_fewshot,
            limit=limit,
            max_length=max_length,
            chat=apply_chat_template,
            output=output_of.get(given),
            quiet=quiet,
        )
        if not as_json:
            click.echo(f"{given}\n{table(found[given])}")
    if as_json:
        click.echo(json.dumps({given: each["results"] for given, each in found.items()}, indent=2))
