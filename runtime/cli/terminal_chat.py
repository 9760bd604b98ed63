"""The terminal chat of `gemma3n chat`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from gemma3n_onnx.runtime.errors import ContextLengthError, Gemma3nError, OptionError
from gemma3n_onnx.runtime.generation.result import Timings
from gemma3n_onnx.runtime.media.reader import Item
from gemma3n_onnx.runtime.model import OnnxGemma3n
from gemma3n_onnx.runtime.options import GREEDY, split_options
from gemma3n_onnx.runtime.prompt.messages import items_of, warnings_of

from .chat_file import ChatFileError, read_chat, write_chat
from .conversation import Answered, Conversation, Question, text_of
from .plain_terminal import CONTINUATION, PROMPT, Terminal, printable

# Name: arguments, purpose.
COMMANDS = {
    "/image": ("SOURCE", "attach an image (a path or a URL) to the next message"),
    "/audio": ("SOURCE", "attach a sound"),
    "/video": ("SOURCE", "attach a video"),
    "/detach": ("", "remove what is attached"),
    "/retry": ("", "answer the last message again"),
    "/set": ("[NAME VALUE]", "change an option, such as temperature 0.8; without NAME, list the options"),
    "/system": ("[TEXT]", "start over with a system prompt; without TEXT, with none"),
    "/reset": ("", "start over"),
    "/save": ("[FILE]", "save the conversation; without FILE, where it was saved or loaded before"),
    "/load": ("FILE", "continue a saved conversation"),
    "/stats": ("", "show speed and memory of the last answer"),
    "/help": ("", "show this help"),
    "/quit": ("", "quit; also /exit and Ctrl-D"),
}
HELP = "\n".join(
    [
        *(f"{f'{name} {arguments}':<20} {purpose}" for name, (arguments, purpose) in COMMANDS.items()),
        "A line that ends with \\ continues on the next line. Ctrl-C stops an answer.",
    ]
)
QUIT = ("/quit", "/exit")
WITH_PATHS = ("/image", "/audio", "/video", "/save", "/load")
# Options that no value typed in a terminal can hold.
NOT_SET_HERE = ("logit_bias", "logits_processor", "logprobs", "stop_token_ids")


@dataclass(frozen=True)
class Attachment:
    """`parts` of a message whose file is read, and the part that names its source."""

    parts: list[dict[str, Any]]
    saved: dict[str, str]


class TerminalChat:
    """Reads messages from a terminal and answers them. `options` are those of `OnnxGemma3n.generate`; `drop_oldest`
    drops the oldest turns when the context is full."""

    def __init__(
        self,
        model: OnnxGemma3n,
        terminal: Terminal,
        system: str | None,
        options: dict[str, Any],
        drop_oldest: bool = False,
    ) -> None:
        self._model, self._terminal, self._options, self._drop_oldest = model, terminal, dict(options), drop_oldest
        self._timings: Timings | None = None
        self._begin(Conversation(model, system))

    def _begin(self, conversation: Conversation, file: Path | None = None) -> None:
        """`file` is where the conversation was saved."""
        self._conversation, self._file = conversation, file
        self._attached: list[Attachment] = []

    def run(self) -> None:
        """Runs until end of input or /quit."""
        with contextlib.suppress(EOFError):
            while True:
                try:
                    message = self._terminal.read().strip()
                except KeyboardInterrupt:
                    click.echo()
                    continue
                if message.partition(" ")[0] in QUIT:
                    return
                try:
                    self._handle(message)
                except ContextLengthError as error:
                    click.echo(f"Error: {error} /reset starts over; --drop-oldest drops the oldest turns.", err=True)
                except Gemma3nError as error:
                    click.echo(f"Error: {error.spelled(_as_command)}", err=True)
                except KeyboardInterrupt:
                    click.echo(
                        " (stopped)" if self._conversation.unanswered is None else " (stopped; /retry asks again)"
                    )

    def _handle(self, message: str) -> None:
        command, _, rest = message.partition(" ")
        rest = rest.strip()
        match command:
            case "":
                return
            case "/help":
                click.echo(HELP)
            case "/reset":
                self._begin(Conversation(self._model, self._conversation.system))
                click.echo("Started over.", err=True)
            case "/system":
                self._begin(Conversation(self._model, rest or None))
                click.echo(f"Started over {'with this' if rest else 'without a'} system prompt.", err=True)
            case "/stats":
                click.echo("No answer yet." if self._timings is None else describe_timings(self._timings))
            case "/image" | "/audio" | "/video":
                self._attach(command[1:], _source(rest))
            case "/detach":
                self._attached = []
                click.echo("Nothing is attached now.", err=True)
            case "/set":
                self._set(*rest.partition(" ")[::2])
            case "/retry":
                self._retry()
            case "/save":
                self._save(_path(rest))
            case "/load":
                self._load(_path(rest))
            case _ if command[0] == "/" and command[1:].isalpha() and "\n" not in message:
                click.echo(f"Unknown command {command}; /help lists the commands.", err=True)
            case _:
                self._ask(message)

    def _attach(self, kind: str, source: str) -> None:
        if not source:
            click.echo(f"Give a path or a URL: /{kind} SOURCE.", err=True)
            return
        part = {"type": kind, kind: source}
        (message,) = self._model.read([{"role": "user", "content": [part]}], split_options(self._options)[1])
        if os.path.isfile(source):
            part[kind] = os.path.abspath(source)
        self._attached.append(Attachment(message["content"], part))
        show_warnings(warnings_of([message]))
        waiting = len(self._attached)
        more = f" The next message has {waiting} attachments." if waiting > 1 else ""
        click.echo(f"Attached {kind} {source}{_extent(kind, items_of([message]))}.{more}", err=True)

    def _set(self, name: str, text: str) -> None:
        name, text = name.strip("-").replace("-", "_"), text.strip()
        generation, media, _ = split_options(self._options, self._model.sampling)
        known = {"sampling": self._options.get("sampling", GREEDY), **vars(generation), **vars(media)}
        settable = {key: value for key, value in known.items() if key not in NOT_SET_HERE}
        if not name:
            click.echo("\n".join(f"{key} {_shown(value)}" for key, value in settable.items()))
            return
        if name not in settable:
            raise OptionError(f"Unknown option {name!r}; use one of {', '.join(settable)}.")
        if not text:
            raise OptionError(f"Give a value, as in: /set {name} {_shown(settable[name])}.")
        value = _value(text)
        options = self._options | {name: () if value is None and name == "stop" else value}
        split_options(options)
        self._options = options
        click.echo(f"{name} is now {text}.", err=True)

    def _ask(self, text: str) -> None:
        attached, self._attached = self._attached, []
        question = Question(text, text)
        if attached:
            written = {"type": "text", "text": text}
            read = [part for each in attached for part in each.parts]
            question = Question([*read, written], [*(each.saved for each in attached), written])
        self._tell(self._conversation.ask(question, self._options, self._terminal.show, self._drop_oldest))

    def _retry(self) -> None:
        self._tell(self._conversation.retry(self._options, self._terminal.show, self._drop_oldest))

    def _tell(self, answered: Answered) -> None:
        self._timings = answered.timings
        if dropped := answered.dropped:
            turns = "turn was" if dropped == 1 else f"{dropped} turns were"
            click.echo(f"The context is full; the oldest {turns} dropped.", err=True)

    def _save(self, path: Path | None) -> None:
        path = path or self._file
        exchanges = self._conversation.exchanges
        if path is None:
            raise ChatFileError("Give a file: /save FILE.")
        if not exchanges:
            raise ChatFileError("There is no answer to save yet; ask something first.")
        if path.exists() and path != self._file:
            raise ChatFileError(f"{path} exists; choose another file.")
        write_chat(self._conversation.saved(), path)
        self._file = path
        click.echo(f"Saved {_counted(exchanges)} to {path}.", err=True)

    def _load(self, path: Path | None) -> None:
        if path is None:
            raise ChatFileError("Give a file: /load FILE.")
        conversation = Conversation.continued(self._model, read_chat(path), split_options(self._options)[1])
        self._begin(conversation, path)
        for exchange in conversation.exchanges:
            show_warnings(warnings_of(exchange.read))
            question, *answers = (text_of(message["content"]) for message in exchange.saved)
            click.echo(PROMPT + printable(question).replace("\n", f"\n{CONTINUATION}"))
            for answer in answers:
                self._terminal.show([answer])
        click.echo(f"Loaded {_counted(conversation.exchanges)} from {path}.", err=True)


def _source(text: str) -> str:
    """A path or a URL as typed: quoted, or escaped as terminals paste a dropped file."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    elif not os.path.exists(text):
        text = text.replace("\\ ", " ")
    return os.path.expanduser(text)


def _path(text: str) -> Path | None:
    return Path(_source(text)).absolute() if text else None


def _extent(kind: str, items: Sequence[Item]) -> str:
    if kind == "audio":
        return f" ({sum(item.seconds for item in items):.1f} s)"
    return f" ({len(items)} frames)" if kind == "video" else ""


def _value(text: str) -> Any:
    """None, a JSON value, or else the text itself."""
    if text == "none":
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _as_command(name: str, value: str) -> str:
    """An option in a message."""
    return f"/set {name} {value}" if value else name


def _shown(value: Any) -> str:
    return "none" if value is None or value == () else value if isinstance(value, str) else json.dumps(value)


def _counted(turns: Sequence[Any]) -> str:
    return f"{len(turns)} turn{'s' if len(turns) > 1 else ''}"


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
