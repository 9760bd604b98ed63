"""`gemma3n chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from gemma3n_onnx.runtime.errors import PromptError
from gemma3n_onnx.runtime.media.fetch import FetchPolicy
from gemma3n_onnx.runtime.model import OnnxGemma3n
from gemma3n_onnx.runtime.options import DEFAULT

from .options import answer_options, artifact_argument, check_answer_options, load_options, template_option
from .terminal import open_terminal
from .terminal_chat import COMMANDS, WITH_PATHS, TerminalChat

HISTORY = Path(click.get_app_dir("gemma3n")) / "chat-history"


@click.command()
@artifact_argument
@template_option
@click.option("--drop-oldest", is_flag=True, help="When the context is full, drop the oldest turns.")
@click.option("--history/--no-history", default=True, show_default=True, help=f"Keep what you type in {HISTORY}.")
@answer_options(DEFAULT)
@load_options
def chat(
    artifact: Path,
    chat_template: Path | None,
    drop_oldest: bool,
    history: bool,
    system: str | None,
    allow_private_urls: bool,
    load: dict[str, Any],
    **options: Any,
) -> None:
    """Chat with the model in the folder ARTIFACT, or of the Hub id ARTIFACT. /help lists the commands."""
    check_answer_options(options)  # before loading a model
    if sys.stdin is None:
        raise PromptError("Standard input is closed; chat in a terminal, or pipe messages in.")
    fetch = FetchPolicy(allow_private=allow_private_urls)
    model = OnnxGemma3n.from_pretrained(artifact, fetch=fetch, chat_template=chat_template, **load)
    terminal = open_terminal([*COMMANDS], WITH_PATHS, HISTORY if history else None)
    if sys.stdin.isatty():
        click.echo("/help lists the commands.", err=True)
    TerminalChat(model, terminal, system, options, drop_oldest).run()
