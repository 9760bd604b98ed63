"""`gemma3n run`: one answer."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from gemma3n_onnx.runtime.errors import PromptError
from gemma3n_onnx.runtime.generation.result import GenerationResult
from gemma3n_onnx.runtime.media.fetch import FetchPolicy
from gemma3n_onnx.runtime.model import OnnxGemma3n
from gemma3n_onnx.runtime.options import GREEDY

from .options import answer_options, artifact_argument, check_answer_options, load_options, template_option
from .terminal_chat import describe_timings, show_warnings

STANDARD_INPUT = "-"


@click.command()
@artifact_argument
@click.argument("prompt", required=False)
@click.option(
    "--prompt-file",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    help="Read the prompt from this UTF-8 file instead.",
)
@click.option("--image", "images", multiple=True, help="Path or URL of an image; repeatable.")
@click.option("--audio", "clips", multiple=True, help="Path or URL of an audio clip; repeatable.")
@click.option("--video", "videos", multiple=True, help="Path or URL of a video; repeatable.")
@click.option(
    "--raw",
    is_flag=True,
    help="Do not apply the chat template. Each <image_soft_token> and <audio_soft_token> in PROMPT then stands for an "
    "image or a clip.",
)
@template_option
@answer_options(GREEDY)
@load_options
@click.option("--stats", is_flag=True, help="Print speed and memory to stderr.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer, its tokens and timings as one JSON object.")
def run(
    artifact: Path,
    prompt: str | None,
    prompt_file: Path | None,
    images: tuple[str, ...],
    clips: tuple[str, ...],
    videos: tuple[str, ...],
    allow_private_urls: bool,
    system: str | None,
    raw: bool,
    chat_template: Path | None,
    load: dict[str, Any],
    stats: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer PROMPT, preceded by any images, clips and videos, with the model in the folder ARTIFACT.

    ARTIFACT may also be a Hub id (owner/name). A PROMPT of - is read from standard input. Without a chat template, all
    prompts are raw.
    """
    if raw and (system is not None or videos):
        raise click.UsageError("--system and --video need the chat template, which --raw skips.")
    prompt = _read_prompt(prompt, prompt_file)
    if not prompt:
        raise PromptError("The prompt is empty; give some text.")
    check_answer_options(options)  # before loading a model
    fetch = FetchPolicy(allow_private=allow_private_urls)
    with warnings.catch_warnings(record=as_json) as caught:
        model = OnnxGemma3n.from_pretrained(artifact, fetch=fetch, chat_template=chat_template, **load)
        if raw or (model.template is None and system is None and not videos):
            answer = model.stream(prompt, images=[*images], audio=[*clips], **options)
        else:
            answer = model.stream(_messages(prompt, images, clips, videos, system), **options)
        if not as_json:
            show_warnings(answer.result.warnings)
        for piece in answer:
            if not as_json:
                click.echo(piece, nl=False)
    click.echo(json.dumps(_described(answer.result, caught or [])) if as_json else "")
    if stats:
        click.echo(describe_timings(answer.result.timings), err=True)


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    """The argument, or all of standard input or of the file, without a byte order mark and the newline that ends it."""
    if (prompt is None) == (file is None):
        raise click.UsageError("Give either PROMPT, - for standard input, or --prompt-file.")
    if prompt is not None and prompt != STANDARD_INPUT:
        return prompt
    if file is None or str(file) == STANDARD_INPUT:
        if sys.stdin is None:
            raise PromptError("Standard input is closed; give the prompt as an argument, or pipe it in.")
        source, content = "Standard input", sys.stdin.buffer.read()
    else:
        source, content = str(file), file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{source} is not UTF-8 text; convert it to UTF-8.") from error
    return text.removesuffix("\n").removesuffix("\r")


def _messages(
    prompt: str, images: Sequence[str], clips: Sequence[str], videos: Sequence[str], system: str | None
) -> list[dict[str, Any]]:
    media = [(kind, s) for kind, sources in (("image", images), ("audio", clips), ("video", videos)) for s in sources]
    content = [*({"type": kind, kind: source} for kind, source in media), {"type": "text", "text": prompt}]
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
    return [*messages, {"role": "user", "content": content if media else prompt}]


def _described(result: GenerationResult, caught: Sequence[warnings.WarningMessage]) -> dict[str, Any]:
    timings = result.timings
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "prompt_token_ids": result.prompt_token_ids,
        "finish_reason": result.finish_reason,
        "timings": {
            **asdict(timings),
            "prefill_tokens_per_second": timings.prefill_tokens_per_second,
            "decode_tokens_per_second": timings.decode_tokens_per_second,
        },
        "warnings": [*result.warnings, *(str(each.message) for each in caught)],
    }
