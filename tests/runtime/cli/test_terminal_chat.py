"""`gemma3n chat`, with lines as they are typed."""

from __future__ import annotations

import builtins
import io
import sys
from pathlib import Path

import pytest

from gemma3n_onnx.runtime import OnnxGemma3n
from gemma3n_onnx.runtime.cli.terminal_chat import HELP, TerminalChat, line_history
from support import run_command

DEMO = Path(__file__).parents[3] / "demo"
SUM, PLUS = "What is 3 plus 4?", "3 plus 4 is 7.\n"


@pytest.fixture(scope="module")
def model(demo_artifact) -> OnnxGemma3n:
    return OnnxGemma3n.from_pretrained(demo_artifact("E2B"))


@pytest.fixture
def talk(model, monkeypatch, capsys):
    """What comes to stdout and stderr of some lines; an exception among them is raised where it would be typed."""

    def run(*lines) -> tuple[str, str]:
        coming = iter(lines)

        def read(_prompt: str) -> str:
            line = next(coming, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", read)
        TerminalChat(model, None, {"max_new_tokens": 64}).run()
        return capsys.readouterr()

    return run


def test_it_answers_line_by_line(talk, model):
    chat = model.chat()
    answers = [chat.send(text, max_new_tokens=64).text for text in (SUM, "And 5?")]
    assert answers[0] + "\n" == PLUS
    assert talk(SUM, "", "And 5?") == ("".join(f"{answer}\n" for answer in answers), "")


def test_media_go_with_the_next_message(talk):
    picture, sound = DEMO / "picture.png", DEMO / "sound.wav"
    out, _ = talk(f"/image {picture}", "What is in the picture?", "/reset", f"/audio '{sound}'", "What do you hear?")
    assert out == "A red circle, a yellow star and a blue square.\nThree high beeps.\n"


def test_an_incomplete_file_is_told_once(talk, tmp_path):
    cut = tmp_path / "cut.wav"
    cut.write_bytes((DEMO / "sound.wav").read_bytes()[:-2_000])
    out, err = talk(f"/audio {cut}", "What do you hear?", "How many beeps are there?")
    assert out.startswith("Three high beeps.\n")
    assert err.startswith("Warning: ") and "cut.wav: The WAV is cut off" in err and err.count("\n") == 1


def test_an_error_ends_one_message_only(talk):
    out, err = talk("/image none.png", "What is in the picture?", SUM)
    assert out == PLUS and "There is no file 'none.png'" in err


def test_commands(talk):
    out, err = talk("/help", "/stats", SUM, "/stats", "/king", "/image", "/exit", "never asked")
    assert out.startswith(HELP + "\nNo answer yet.\n" + PLUS + "prefill ")
    assert "Unknown command /king" in err and "/image SOURCE" in err and "never" not in out


def test_lines_are_joined_and_a_system_prompt_begins_anew(talk, model):
    system = "You are brief."
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "What is 3\nplus 4?"}]
    out, _ = talk(f"/system {system}", "What is 3\\", "plus 4?")
    assert out == model.generate(messages, max_new_tokens=64).text + "\n"


def test_ctrl_c_stops_an_answer_and_not_the_program(talk, model, monkeypatch):
    step = type(model.engine.step_runner(model.engine.new_cache(1, 8))).step_greedy
    left = [3]

    def interrupted(decoder, *arguments):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return step(decoder, *arguments)

    monkeypatch.setattr("gemma3n_onnx.runtime.engine.engine.StepRunner.step_greedy", interrupted)
    out, _ = talk(SUM, KeyboardInterrupt(), SUM)
    stopped, _, rest = out.partition(" (stopped; message and answer were dropped)\n")
    assert PLUS.startswith(stopped) and stopped != PLUS
    assert rest == "\n" + PLUS


def test_the_command_reads_from_a_pipe(demo_artifact, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{SUM}\n/exit\n"))
    outcome = run_command(monkeypatch, ["gemma3n", "chat", str(demo_artifact("E2B"))])
    assert (outcome.code, outcome.out, outcome.err) == (0, PLUS, "")


def test_history_is_kept(tmp_path):
    readline = pytest.importorskip("readline")
    readline.clear_history()
    for line in ("first", "second"):
        with line_history(tmp_path / "deep" / "history"):
            readline.add_history(line)
        readline.clear_history()
    assert (tmp_path / "deep" / "history").read_text().split()[-2:] == ["first", "second"]
