"""Chooses how `gemma3n chat` reads messages and shows answers."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from .plain_terminal import PlainTerminal, Terminal


def open_terminal(words: Sequence[str], with_paths: Sequence[str], history: Path | None) -> Terminal:
    """The terminal for standard input and output.

    Where both are a terminal and the extra `chat` is installed, Tab completes the commands `words`, and paths after
    `with_paths`; messages are kept in the file `history`, if it is not None and can be written.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return PlainTerminal()
    try:
        from .rich_terminal import RichTerminal
    except ModuleNotFoundError:
        click.echo('For Markdown, pasted blocks, completion and a history: pip install "gemma3n-onnx[chat]".', err=True)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # edits the lines of `input`
        return PlainTerminal()
    return RichTerminal(words, with_paths, _writable(history))


def _writable(history: Path | None) -> Path | None:
    """The file, which only its owner can read; None if it cannot be written."""
    if history is None:
        return None
    try:
        history.parent.mkdir(parents=True, exist_ok=True)
        history.touch(mode=0o600)
    except OSError:
        return None
    return history if os.access(history, os.W_OK) else None
