"""The terminal of `gemma3n chat` with prompt_toolkit and rich; `ci/terminal/run.sh` tries it in tmux."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from gemma3n_onnx.runtime.cli import rich_terminal
from gemma3n_onnx.runtime.cli.plain_terminal import PlainTerminal
from gemma3n_onnx.runtime.cli.rich_terminal import CommandCompleter, RichTerminal
from gemma3n_onnx.runtime.cli.terminal import open_terminal

PASTED = "\x1b[200~{}\x1b[201~"
ENTER, ALT_ENTER, UP, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x1b[A", "\x03", "\x04"


@pytest.fixture
def keys():
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


def opened(history: Path | None = None) -> RichTerminal:
    return RichTerminal([], [], history)


def test_pasted_lines_are_one_message(keys: PipeInput) -> None:
    keys.send_text("Explain:\\\r" + PASTED.format("def f():\n    return 1\n") + "now" + ALT_ENTER + "please" + ENTER)
    assert opened().read() == "Explain:\ndef f():\n    return 1\nnow\nplease"


def test_ctrl_c_and_ctrl_d(keys: PipeInput) -> None:
    reading = opened()
    for key, error in ((CTRL_C, KeyboardInterrupt), (CTRL_D, EOFError)):
        keys.send_text(key)
        with pytest.raises(error):
            reading.read()


def test_commands_and_paths_are_completed(tmp_path: Path) -> None:
    (tmp_path / "picture.png").touch()
    completer = CommandCompleter(["/image", "/quit"], ["/image"])

    def completed(typed: str) -> list[str]:
        return [each.text for each in completer.get_completions(Document(typed), CompleteEvent())]

    assert completed("/i") == ["/image"] and completed("/") == ["/image", "/quit"]
    assert completed(f"/image {tmp_path}/pic") == ["ture.png"]
    assert completed("i") == completed(f"/quit {tmp_path}/pic") == []


def test_messages_are_kept_for_their_owner_only(keys: PipeInput, tmp_path: Path, monkeypatch) -> None:
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    file = tmp_path / "deep" / "history"
    keys.send_text("first\\\rline" + ENTER)
    assert open_terminal([], [], file).read() == "first\nline"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    keys.send_text(UP + ENTER)
    assert open_terminal([], [], file).read() == "first\nline"
    for elsewhere in (None, file / "below a file"):
        keys.send_text("secret" + ENTER)
        assert open_terminal([], [], elsewhere).read() == "secret"
    assert "secret" not in file.read_text()


def test_without_the_extra_there_is_a_plain_terminal(monkeypatch, capsys) -> None:
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    monkeypatch.delitem(sys.modules, rich_terminal.__name__)
    assert isinstance(open_terminal([], [], None), PlainTerminal)
    assert 'pip install "gemma3n-onnx[chat]"' in capsys.readouterr().err


def test_markdown_is_shown_whole(capsys) -> None:
    text = (
        "# Title\n\nOne\ntwo *three* <b>bold</b> [link](https://example.org/x)\n\n1. first\n2. second\n\n"
        "```python\nprint(1)\n```\n\n| a | b |\n| - | - |\n| 1 | 2 |\n\n<div>block</div>\n\nend\x1b[2J"
    )
    opened().show(text)  # letter by letter
    shown = capsys.readouterr().out
    lines = [line.strip() for line in shown.splitlines()]
    assert "One" in lines and "two three <b>bold</b> link (https://example.org/x)" in lines
    assert "print(1)" in lines and "<div>block</div>" in lines and lines[-2:] == ["end�[2J", ""]
    assert all(line == line.rstrip() for line in shown.splitlines())
    assert shown.count("Title") == shown.count("second") == shown.count("print") == 1


def test_what_came_before_ctrl_c_stays(capsys) -> None:
    def pieces():
        yield "First block.\n\nSecond "
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened().show(pieces())
    assert capsys.readouterr().out.split() == ["First", "block.", "Second"]
