"""The terminal chat of `gemma3n chat`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from gemma3n_onnx.runtime.errors import Gemma3nError
from gemma3n_onnx.runtime.generation.result import Timings
from gemma3n_onnx.runtime.model import OnnxGemma3n

HELP = """\
/image SOURCE    attach an image (path or URL) to the next message; also /audio and /video
/system TEXT     start over with a system prompt; without TEXT, with none
/reset           start over
/stats           show speed and memory of the last answer
/help            show this help
/exit            quit; also Ctrl-D
A line that ends with \\ continues on the next line. Ctrl-C stops an answer."""
MEDIA = ("image", "audio", "video")
PROMPT, CONTINUATION = "> ", "  "
HISTORY_LINES = 1000


class TerminalChat:
    """Reads lines and prints answers. `options` are those of `OnnxGemma3n.generate`."""

    def __init__(self, model: OnnxGemma3n, system: str | None, options: dict[str, Any]) -> None:
        self._model, self._options = model, options
        self._chat = model.chat(system)
        self._attached: list[dict[str, str]] = []
        self._timings: Timings | None = None

    def run(self) -> None:
        """Runs until end of input or /exit."""
        with contextlib.suppress(EOFError):
            while True:
                try:
                    message = _read_message()
                except KeyboardInterrupt:
                    click.echo()
                    continue
                if message == "/exit":
                    return
                try:
                    self._handle(message)
                except Gemma3nError as error:
                    click.echo(f"Error: {error}", err=True)

    def _handle(self, message: str) -> None:
        command, _, rest = message.partition(" ")
        rest = rest.strip()
        match command:
            case "":
                return
            case "/help":
                click.echo(HELP)
            case "/reset":
                self._chat.reset()
                self._attached = []
            case "/system":
                self._chat = self._model.chat(rest or None)
                self._attached = []
            case "/stats":
                click.echo("No answer yet." if self._timings is None else describe_timings(self._timings))
            case "/image" | "/audio" | "/video":
                self._attach(command[1:], rest)
            case _ if message.startswith("/") and command[1:].isalpha():
                click.echo(f"Unknown command {command}; /help lists the commands.", err=True)
            case _:
                self._answer(message)

    def _attach(self, kind: str, source: str) -> None:
        source = source.strip("'\"")
        if not source:
            click.echo(f"Give a path or a URL: /{kind} SOURCE.", err=True)
            return
        if source.startswith("~"):
            source = str(Path(source).expanduser())
        self._attached.append({"type": kind, kind: source})

    def _answer(self, message: str) -> None:
        attached, self._attached = self._attached, []
        content = [*attached, {"type": "text", "text": message}] if attached else message
        turn = self._chat.stream(content, **self._options)
        show_warnings(turn.result.warnings)
        try:
            with contextlib.closing(iter(turn)) as pieces:
                for piece in pieces:
                    click.echo(piece, nl=False)
            self._timings = turn.result.timings
        except KeyboardInterrupt:
            click.echo(" (stopped; message and answer were dropped)", nl=False)
        click.echo()


def _read_message() -> str:
    """One line, or several joined by trailing backslashes. EOFError: end of input."""
    lines = [_read_line(PROMPT)]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(_read_line(CONTINUATION))
    return "\n".join(lines).strip()


def _read_line(prompt: str) -> str:
    return input(prompt if sys.stdin.isatty() else "")


@contextlib.contextmanager
def line_history(path: Path) -> Iterator[None]:
    """Line editing with a history that persists between conversations, where readline is available."""
    try:
        import readline
    except ImportError:
        yield
        return
    readline.set_history_length(HISTORY_LINES)
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)


def show_warnings(warnings: Iterable[str]) -> None:
    for warning in warnings:
        click.echo(f"Warning: {warning}", err=True)


def describe_timings(timings: Timings) -> str:
    memory = timings.peak_memory_bytes
    encoders = f"encoders {timings.encoder_seconds:.2f} s | " if timings.encoder_seconds >= 0.01 else ""
    return (
        f"{encoders}prefill {timings.prefill_tokens} tokens, {timings.prefill_tokens_per_second:.1f} tok/s | "
        f"first token after {timings.time_to_first_token:.2f} s | "
        f"decode {timings.decode_tokens} tokens, {timings.decode_tokens_per_second:.1f} tok/s | "
        f"peak memory {'unknown' if memory is None else f'{memory / 2**30:.2f} GiB'}"
    )
