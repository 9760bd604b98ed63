"""`gemma3n run`: one answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gemma3n_onnx.runtime.errors import PromptError
from gemma3n_onnx.runtime.media.fetch import FetchPolicy
from gemma3n_onnx.runtime.model import OnnxGemma3n
from gemma3n_onnx.runtime.options import read_options

from .options import answer_options, artifact_argument, load_options
from .terminal_chat import describe_timings, show_warnings


@click.command()
@artifact_argument
@click.argument("prompt")
@click.option("--image", "images", multiple=True, help="Path or URL of an image; repeatable.")
@click.option("--audio", "clips", multiple=True, help="Path or URL of an audio clip; repeatable.")
@click.option("--video", "videos", multiple=True, help="Path or URL of a video; repeatable.")
@click.option("--raw", is_flag=True, help="Do not apply the chat template.")
@answer_options
@load_options
@click.option("--stats", is_flag=True, help="Print speed and memory to stderr.")
def run(
    artifact: Path,
    prompt: str,
    images: tuple[str, ...],
    clips: tuple[str, ...],
    videos: tuple[str, ...],
    allow_private_urls: bool,
    system: str | None,
    raw: bool,
    load: dict[str, Any],
    stats: bool,
    **options: Any,
) -> None:
    """Answer PROMPT, preceded by any images, clips and videos, with the model in the folder ARTIFACT."""
    if raw and (system is not None or images or clips or videos):
        raise click.UsageError("--system, --image, --audio and --video need the chat template, which --raw skips.")
    if not prompt:
        raise PromptError("The prompt is empty; give some text.")
    read_options(options)  # reject bad options before loading a model
    fetch = FetchPolicy(allow_private=allow_private_urls)
    model = OnnxGemma3n.from_pretrained(artifact, fetch=fetch, **load)
    media = [(kind, s) for kind, sources in (("image", images), ("audio", clips), ("video", videos)) for s in sources]
    content = [*({"type": kind, kind: source} for kind, source in media), {"type": "text", "text": prompt}]
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": content if media else prompt})
    plain = raw or (model.template is None and not media)
    answer = model.stream(prompt if plain else messages, **options)
    show_warnings(answer.result.warnings)
    for piece in answer:
        click.echo(piece, nl=False)
    click.echo()
    if stats:
        click.echo(describe_timings(answer.result.timings), err=True)
