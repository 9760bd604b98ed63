"""Scores an exported demo on questions that it was not trained on:
`python -m gemma3n_onnx.training.evaluate ARTIFACT ...`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from gemma3n_onnx.runtime.cli import exit_with_message
from gemma3n_onnx.runtime.model import OnnxGemma3n

from .conversations import Conversation, exam, messages_of
from .pictures import Picture
from .sounds import RATE_HZ, Sound

MAX_NEW_TOKENS = 48


def sources_of(conversation: Conversation) -> list[Any]:
    """What a model is given for the media of a conversation: PIL images, and samples with their rate."""
    return [_source(medium) for medium in conversation.media]


def _source(medium: Picture | Sound) -> Any:
    return medium.draw() if isinstance(medium, Picture) else (medium.synthesize()[0], RATE_HZ)


def answer(model: OnnxGemma3n, conversation: Conversation) -> str:
    messages = messages_of(conversation, sources_of(conversation))
    return model.generate(messages, max_new_tokens=MAX_NEW_TOKENS).text


def accuracy(model: OnnxGemma3n, tasks: Mapping[str, Sequence[Conversation]]) -> dict[str, float]:
    """The share of answers of each task that are right to the letter."""
    return {
        task: float(np.mean([answer(model, asked) == asked.turns[-1].answer for asked in conversations]))
        for task, conversations in tasks.items()
    }


@click.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--each", default=100, show_default=True, type=click.IntRange(1), help="Questions of each task.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the questions.")
@click.option("--json", "as_json", is_flag=True)
def command(artifacts: tuple[Path, ...], each: int, seed: int, as_json: bool) -> None:
    """Print the share of right answers of exported demos, ARTIFACTS, for every task."""
    tasks = exam(seed, each)
    scores: dict[str, dict[str, float]] = {}
    for folder in artifacts:
        model = OnnxGemma3n.from_pretrained(folder)
        scores[f"{model.manifest.slice} {model.manifest.precision}"] = accuracy(model, tasks)
    if as_json:
        click.echo(json.dumps(scores, indent=2))
        return
    click.echo(
        _table([["task", *scores], *([task, *(f"{100 * of[task]:.1f}" for of in scores.values())] for task in tasks)])
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown, the first row its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"| --- {'| ---: ' * (len(rows[0]) - 1)}|", *lines[1:]])


if __name__ == "__main__":
    exit_with_message(partial(command.main, prog_name="evaluate", standalone_mode=False))
