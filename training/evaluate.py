"""Scores an exported demo on questions that it was not trained on:
`python -m gemma3n_onnx.training.evaluate ARTIFACT ...`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from gemma3n_onnx.runtime.answer import GenerationResult
from gemma3n_onnx.runtime.cli import exit_with_message
from gemma3n_onnx.runtime.model import OnnxGemma3n
from gemma3n_onnx.runtime.sampling import log_probabilities

from .conversations import Conversation, exam, messages_of
from .pictures import Picture
from .sounds import RATE_HZ, Sound

MAX_NEW_TOKENS = 48


def sources_of(conversation: Conversation) -> list[Any]:
    """What a model is given for the media of a conversation: PIL images, and samples with their rate."""
    return [_source(medium) for medium in conversation.media]


def _source(medium: Picture | Sound) -> Any:
    return medium.draw() if isinstance(medium, Picture) else (medium.synthesize()[0], RATE_HZ)


def answer(model: OnnxGemma3n, conversation: Conversation) -> GenerationResult:
    messages = messages_of(conversation, sources_of(conversation))
    return model.generate(messages, max_new_tokens=MAX_NEW_TOKENS, logprobs=0)


def surprise(model: OnnxGemma3n, conversation: Conversation) -> float:
    """-ln p, in nats, of the right answer with the token that ends it."""
    prompt = model.encode(messages_of(conversation, sources_of(conversation))).encoded()
    tokens = model.tokenizer.encode(f"{conversation.turns[-1].answer}<end_of_turn>", add_bos=False)
    cache = model.engine.new_cache(1, len(prompt) + len(tokens))
    logits = model.engine.prefill(cache, 0, prompt.ids, prompt.slots)
    decoder, nats = model.engine.decoder(cache), 0.0
    for token in tokens:
        nats -= log_probabilities(logits, token, 0).logprob
        logits = decoder.step(np.array([token]), np.array([True]))[0]
    return nats


@dataclass(frozen=True)
class Scores:
    """`right`: for each task the share of answers that are right to the letter. `nats`: mean `surprise` of them all."""

    right: dict[str, float]
    nats: float


def examine(model: OnnxGemma3n, tasks: Mapping[str, Sequence[Conversation]]) -> Scores:
    count = sum(map(len, tasks.values()))
    right, nats = {}, 0.0
    with tqdm(total=count, unit="question", disable=None, leave=False) as bar:
        for task, conversations in tasks.items():
            answered = 0
            for asked in conversations:
                given = answer(model, asked)
                if given.text == asked.turns[-1].answer:
                    answered += 1
                    nats -= sum(token.logprob for token in given.logprobs or ())
                else:
                    nats += surprise(model, asked)
                bar.update()
            right[task] = answered / len(conversations)
    return Scores(right, nats / count)


@click.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--each", default=100, show_default=True, type=click.IntRange(1), help="Questions of each task.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the questions.")
@click.option("--json", "as_json", is_flag=True)
def command(artifacts: tuple[Path, ...], each: int, seed: int, as_json: bool) -> None:
    """Print the share of right answers of exported demos, ARTIFACTS, for every task, and how unlikely they find a
    right answer."""
    tasks = exam(seed, each)
    scores: dict[str, Scores] = {}
    for folder in artifacts:
        model = OnnxGemma3n.from_pretrained(folder)
        scores[f"{model.manifest.slice} {model.manifest.precision}"] = examine(model, tasks)
    if as_json:
        click.echo(json.dumps({name: asdict(of) for name, of in scores.items()}, indent=2))
        return
    rows = [[task, *(f"{100 * of.right[task]:.1f}" for of in scores.values())] for task in tasks]
    nats = ["nats per right answer", *(f"{of.nats:.4f}" for of in scores.values())]
    click.echo(_table([["task", *scores], *rows, nats]))


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown, the first row its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"| --- {'| ---: ' * (len(rows[0]) - 1)}|", *lines[1:]])


if __name__ == "__main__":
    exit_with_message(partial(command.main, prog_name="evaluate", standalone_mode=False))
