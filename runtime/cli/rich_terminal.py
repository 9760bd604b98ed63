"""A terminal with line editing by prompt_toolkit and Markdown by rich, which the extra `chat` installs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from .plain_terminal import CONTINUATION, PROMPT, printable

INTERRUPT = "^C"  # Terminals echo it at the cursor. Lines leave room for it: a wrapped line could not be redrawn.
# rich drops HTML, which is text here.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


class RichTerminal:
    """Enter sends a message. Pasted lines are one message; Alt+Enter, or a backslash at the end, starts a new line."""

    def __init__(self, words: Sequence[str], with_paths: Sequence[str], history: Path | None) -> None:
        self._console = Console(highlight=False)
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=CONTINUATION,
            key_bindings=_key_bindings(),
            history=InMemoryHistory() if history is None else FileHistory(str(history)),
            completer=CommandCompleter(words, with_paths),
            complete_while_typing=False,
            enable_suspend=True,
        )

    def read(self) -> str:
        return self._session.prompt()

    def show(self, pieces: Iterable[str]) -> None:
        """Blocks of Markdown that are complete are printed; the last one is drawn anew as it grows."""
        growing, first = "", True
        try:
            with Live(console=self._console, transient=True, refresh_per_second=12) as live:
                for piece in pieces:
                    complete, growing = _split(growing + printable(piece))
                    if complete:
                        self._print(complete, first)
                        first = False
                    live.update(_Block(growing, self._console.height - 1))
        finally:  # Ctrl-C, too
            self._print(growing, first)
        self._console.print()

    def _print(self, text: str, first: bool) -> None:
        if text.strip():
            if not first:
                self._console.print()
            self._console.print(_Block(text), end="")


def _split(text: str) -> tuple[str, str]:
    """Text before and from its last block on."""
    starts = [token.map[0] for token in _PARSER.parse(text) if token.level == 0 and token.map]
    if len(starts) < 2:
        return "", text
    lines = text.split("\n")
    return "\n".join(lines[: starts[-1]]), "\n".join(lines[starts[-1] :])


def _markdown(text: str) -> Markdown:
    # The terminal's own colours, and no background; links show their addresses.
    shown = Markdown(text, code_theme="ansi_dark", hyperlinks=False)
    shown.parsed = _PARSER.parse(text)
    for token in shown.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return shown


@dataclass(frozen=True)
class _Block:
    """Markdown without blank lines around it and blanks at the ends of lines; only the `last` lines, if given."""

    text: str
    last: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width - len(INTERRUPT)
        rendered = console.render_lines(_markdown(self.text), options.update(width=width, height=None), pad=False)
        lines = [_stripped(line) for line in rendered]
        filled = [place for place, line in enumerate(lines) if line] or [-1]
        lines = lines[filled[0] : filled[-1] + 1]
        for line in lines if self.last is None else lines[-self.last :]:
            yield from line
            yield Segment.line()


def _stripped(line: Sequence[Segment]) -> list[Segment]:
    """The line without blanks at its end."""
    kept = [*line]
    while kept:
        text, style, _ = kept.pop()
        if text.strip():
            return [*kept, Segment(text.rstrip(), style)]
    return kept


class CommandCompleter(Completer):
    """Completes `words`, and paths after those `with_paths`."""

    def __init__(self, words: Sequence[str], with_paths: Sequence[str]) -> None:
        self._words, self._with_paths = words, with_paths
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        typed = document.text_before_cursor
        command, space, path = typed.partition(" ")
        if not space and typed.startswith("/"):
            yield from (Completion(word, -len(typed)) for word in self._words if word.startswith(typed))
        elif command in self._with_paths:
            yield from self._paths.get_completions(Document(path), complete_event)


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings
