"""How `gemma3n chat` reads messages and shows answers in a pipe, or without the extra `chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Protocol

import click

PROMPT, CONTINUATION = "> ", "  "
# Control characters, except newline and tab: an answer must not move the cursor or set the terminal's title.
_CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")}, "\ufffd") | {ord("\r"): ""}


class Terminal(Protocol):
    def read(self) -> str:
        """The next message, which may have several lines. Raises EOFError at the end, KeyboardInterrupt on Ctrl-C."""

    def show(self, pieces: Iterable[str]) -> None:
        """Shows an answer while its pieces come, and ends its last line."""


class PlainTerminal:
    """One line is a message; a line that ends with a backslash continues on the next one."""

    def read(self) -> str:
        lines = [self._line(PROMPT)]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._line(CONTINUATION))
        return "\n".join(lines)

    def show(self, pieces: Iterable[str]) -> None:
        for piece in pieces:
            click.echo(printable(piece), nl=False)
        click.echo()

    def _line(self, prompt: str) -> str:
        return input(prompt if sys.stdin.isatty() else "")


def printable(text: str) -> str:
    return text.translate(_CONTROLS)
