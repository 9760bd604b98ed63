"""Scores an exported demo on questions that it was not trained on:
`python -m gemma3n_onnx.training.evaluate ARTIFACT ...`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from gemma3n_onnx.export.verify.parity import kl_divergence
from gemma3n_onnx.runtime.cli.exit import exit_with_message
from gemma3n_onnx.runtime.generation.logprobs import log_probabilities
from gemma3n_onnx.runtime.model import OnnxGemma3n

from .conversations import Conversation, messages_of
from .exam import LATER, exam, later_exam
from .pictures import Picture
from .sounds import RATE_HZ, Sound

REFERENCE_EACH = 5
"""Questions of a task on which models are compared."""


def sources_of(conversation: Conversation) -> list[Any]:
    """What a model is given for the media of a conversation: PIL images, and samples with their rate."""
    return [_source(medium) for medium in conversation.media]


def _source(medium: Picture | Sound) -> Any:
    return medium.draw() if isinstance(medium, Picture) else (medium.synthesize()[0], RATE_HZ)


def answer_logits(model: OnnxGemma3n, conversation: Conversation) -> tuple[list[int], np.ndarray]:
    """The tokens of the right answer, with the one that ends it, and the logits [n, V] fp32 that each is chosen from,
    given those before."""
    prompt = model.encode(messages_of(conversation, sources_of(conversation))).encoded()
    tokens = model.tokenizer.encode(f"{conversation.turns[-1].answer}<end_of_turn>", add_bos=False)
    cache = model.engine.new_cache(1, len(prompt) + len(tokens))
    logits = [model.engine.prefill(cache, 0, prompt.ids, prompt.spans)]
    decoder = model.engine.step_runner(cache)
    logits += [decoder.step(np.array([token]), np.array([True]))[0].copy() for token in tokens[:-1]]
    return tokens, np.stack(logits)


@dataclass(frozen=True)
class Scores:
    """For each task `right`, the share of questions to which greedy decoding gives the right answer to the letter,
    `chance`, the share to expect when answers are drawn at temperature 1, and `nats`, the mean of -ln p of the right
    answer with the token that ends it. `kl`: from a reference's choices, mean over the tokens of right answers, in
    nats; None without a reference."""

    right: dict[str, float]
    chance: dict[str, float]
    nats: dict[str, float]
    kl: float | None = None


def examine(
    model: OnnxGemma3n,
    tasks: Mapping[str, Sequence[Conversation]],
    reference: Sequence[tuple[Conversation, np.ndarray]] = (),
) -> Scores:
    """`reference`: conversations with the `answer_logits` that another model has for them."""
    asked = [(task, conversation) for task, of_task in tasks.items() for conversation in of_task]
    scored: dict[str, list[tuple[float, float, float]]] = {task: [] for task in tasks}
    with tqdm(total=len(asked), unit="question", disable=None, leave=False) as bar:
        # All questions about a picture one after another: the model keeps what it has seen.
        for task, conversation in sorted(asked, key=lambda pair: [id(medium) for medium in pair[1].media]):
            tokens, logits = answer_logits(model, conversation)
            right = logits.argmax(-1).tolist() == tokens
            nats = -sum(log_probabilities(row, token, 0).logprob for token, row in zip(tokens, logits, strict=True))
            scored[task].append((right, math.exp(-nats), nats))
            bar.update()
    kl = [kl_divergence(theirs, answer_logits(model, conversation)[1]) for conversation, theirs in reference]
    rights, chances, all_nats = (
        {task: fmean(score[i] for score in of_task) for task, of_task in scored.items()} for i in range(3)
    )
    return Scores(rights, chances, all_nats, float(np.concatenate(kl).mean()) if kl else None)


@click.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--each", default=100, show_default=True, type=click.IntRange(1), help="Questions of each task.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the questions.")
@click.option(
    "--reference",
    "reference_folder",
    type=click.Path(path_type=Path),
    help="An artifact from whose choices the others' distance is measured.",
)
@click.option("--json", "as_json", is_flag=True)
def command(artifacts: tuple[Path, ...], each: int, seed: int, reference_folder: Path | None, as_json: bool) -> None:
    """Print the share of right answers of exported demos, ARTIFACTS, for every task, asked first and in a later turn,
    the share to expect at temperature 1, how unlikely they find a right answer, and the KL divergence from a
    reference."""
    first, later = exam(seed, each), later_exam(seed, each)
    tasks = first | later
    reference = []
    if reference_folder is not None:
        original = OnnxGemma3n.from_pretrained(reference_folder)
        some = [conversation for conversations in first.values() for conversation in conversations[:REFERENCE_EACH]]
        reference = [(conversation, answer_logits(original, conversation)[1]) for conversation in some]
    scores: dict[str, Scores] = {}
    for folder in artifacts:
        model = OnnxGemma3n.from_pretrained(folder)
        scores[f"{model.manifest.slice} {model.manifest.precision}"] = examine(model, tasks, reference)
    if as_json:
        click.echo(json.dumps({name: asdict(score) for name, score in scores.items()}, indent=2))
        return
    columns = scores.values()
    rows = [[task, *(f"{100 * score.right[task]:.1f}" for score in columns)] for task in tasks]
    for asked, title in ((first, "{}"), (later, LATER)):
        chances = [fmean(score.chance[task] for task in asked) for score in columns]
        nats = [fmean(score.nats[task] for task in asked) for score in columns]
        rows.append([title.format("all at temperature 1"), *(f"{100 * chance:.1f}" for chance in chances)])
        rows.append([title.format("nats per right answer"), *(f"{value:.4f}" for value in nats)])
    kl = [["KL, nats a token", *(f"{score.kl:.2e}" for score in columns)]] if reference else []
    click.echo(_table([["task", *scores], *rows, *kl]))


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown, the first row its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"| --- {'| ---: ' * (len(rows[0]) - 1)}|", *lines[1:]])


if __name__ == "__main__":
    exit_with_message(partial(command.main, prog_name="evaluate", standalone_mode=False))
