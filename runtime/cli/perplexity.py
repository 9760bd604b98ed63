"""`gemma3n perplexity`: how well an artifact predicts a text."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from gemma3n_onnx.runtime.errors import PromptError
from gemma3n_onnx.runtime.model import OnnxGemma3n

from .options import artifact_argument, load_options


@click.command()
@artifact_argument
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--window", type=int, help="Tokens of a window, which begins with <bos>. Default: 2048.")
@click.option("--stride", type=int, help="Tokens that each later window scores. Default: all of it, without overlap.")
@load_options
@click.option("--json", "as_json", is_flag=True)
def perplexity(
    artifact: Path, file: Path, window: int | None, stride: int | None, load: dict[str, Any], as_json: bool
) -> None:
    """Score the text in FILE, in UTF-8, with the model in the folder ARTIFACT, or of the Hub id ARTIFACT."""
    from gemma3n_onnx.runtime.evaluation.perplexity import perplexity as measure

    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{file} is not UTF-8 text; convert it first.") from error
    model = OnnxGemma3n.from_pretrained(artifact, prefix_cache_size=0, **load)
    with click.progressbar(length=1, label="Scoring", file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:

        def show(done: int, count: int) -> None:
            bar.length = count
            bar.update(done - bar.pos)

        found = measure(model, text, window=window, stride=stride, progress=show)
    figures = {"perplexity": found.per_token, "word_perplexity": found.per_word, "bits_per_byte": found.bits_per_byte}
    if as_json:
        finite = {name: figure if math.isfinite(figure) else None for name, figure in figures.items()}
        click.echo(json.dumps(finite | asdict(found)))
        return
    click.echo(f"perplexity {found.per_token:.4f} per token, {found.per_word:.4f} per word")
    click.echo(f"{found.bits_per_byte:.4f} bits per byte; {found.tokens:,} tokens")
