"""`gemma3n chat`, with lines as they are typed."""

from __future__ import annotations

import base64
import builtins
import io
import json
import os
import sys
import wave
from pathlib import Path

import pytest

from gemma3n_onnx.runtime import OnnxGemma3n
from gemma3n_onnx.runtime.cli.chat_file import ChatFileError, write_chat
from gemma3n_onnx.runtime.cli.plain_terminal import PlainTerminal
from gemma3n_onnx.runtime.cli.terminal_chat import HELP, TerminalChat
from support import run_command

DEMO = Path(__file__).parents[3] / "demo"
PICTURE, SOUND = DEMO / "picture.png", DEMO / "sound.wav"
SUM, PLUS = "What is 3 plus 4?", "3 plus 4 is 7.\n"
LOOK, SHAPES = "What is in the picture?", "A red circle, a yellow star and a blue square.\n"
LISTEN, BEEPS = "What do you hear?", "Three high beeps.\n"
COUNT, THREE = "How many shapes are there?", "A red circle and a yellow star and a blue square: three shapes.\n"


@pytest.fixture(scope="module")
def model(demo_artifact) -> OnnxGemma3n:
    return OnnxGemma3n.from_pretrained(demo_artifact("E2B"))


@pytest.fixture
def talk(model, monkeypatch, capsys):
    """What comes to stdout and stderr of some lines; an exception among them is raised where it would be typed."""

    def run(*lines, drop_oldest: bool = False, **options) -> tuple[str, str]:
        coming = iter(lines)

        def read(_prompt: str) -> str:
            line = next(coming, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", read)
        TerminalChat(model, PlainTerminal(), None, {"max_new_tokens": 64} | options, drop_oldest).run()
        return capsys.readouterr()

    return run


@pytest.fixture
def interrupted(model, monkeypatch):
    """Ctrl-C at the third step of the next answer."""
    step = type(model.engine.step_runner(model.engine.new_cache(1, 8))).step_greedy
    left = [3]

    def stepping(decoder, *arguments):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return step(decoder, *arguments)

    monkeypatch.setattr("gemma3n_onnx.runtime.engine.engine.StepRunner.step_greedy", stepping)


def test_it_answers_line_by_line(talk, model):
    chat = model.chat()
    answers = [chat.send(text, max_new_tokens=64).text for text in (SUM, "And 5?")]
    assert answers[0] + "\n" == PLUS
    assert talk(SUM, "", "And 5?") == ("".join(f"{answer}\n" for answer in answers), "")


def test_media_go_with_the_next_message(talk):
    out, err = talk(f"/image {PICTURE}", LOOK, "/reset", f"/audio '{SOUND}'", LISTEN)
    assert out == SHAPES + BEEPS
    assert err == f"Attached image {PICTURE}.\nStarted over.\nAttached audio {SOUND} (2.6 s).\n"


def test_several_attachments_are_counted_and_detached(talk):
    out, err = talk(f"/image {PICTURE}", f"/audio {SOUND}", "What do you see and hear?")
    assert out == "I see a red circle, a yellow star and a blue square. I hear three high beeps.\n"
    assert "The next message has 2 attachments." in err
    assert talk(f"/image {PICTURE}", "/detach", SUM)[0] == PLUS


def test_an_attachment_that_cannot_be_read_is_refused_at_once(talk, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for source, told in (("nope.png", "There is no file 'nope.png'"), (tmp_path / "text.png", "not an image")):
        out, err = talk(f"/image {source}", SUM)
        assert out == PLUS and told in err and err.count("\n") == 1


def test_paths_as_terminals_paste_them(talk, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my picture.png").write_bytes(PICTURE.read_bytes())
    paths = (f"'{tmp_path}/my picture.png'", f"{tmp_path}/my\\ picture.png", "~/my picture.png")
    _, err = talk(*(f"/image {path}" for path in paths))
    assert err.count(f"Attached image {tmp_path}/my picture.png.") == 3


def test_an_incomplete_file_is_told_once(talk, tmp_path):
    cut = tmp_path / "cut.wav"
    cut.write_bytes(SOUND.read_bytes()[:-2_000])
    out, err = talk(f"/audio {cut}", LISTEN, "How many beeps are there?")
    assert out.startswith(BEEPS)
    assert err.startswith("Warning: ") and "cut.wav: The WAV is cut off" in err and err.count("Warning") == 1


def test_commands(talk):
    out, err = talk("/help", "/stats", SUM, "/stats", "/king of Sweden", "/image", "/exit", "never asked")
    assert out.startswith(HELP + "\nNo answer yet.\n" + PLUS + "prefill ")
    assert "Unknown command /king" in err and "/image SOURCE" in err and "never" not in out
    assert talk("/quit", SUM) == ("", "")


def test_lines_are_joined_and_a_system_prompt_begins_anew(talk, model):
    system = "You are brief."
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "What is 3\nplus 4?"}]
    out, _ = talk(f"/system {system}", "What is 3\\", "plus 4?")
    assert out == model.generate(messages, max_new_tokens=64).text + "\n"


def test_options_are_set(talk, model):
    out, err = talk("/set max-new-tokens 3", "/set stop plus", SUM, "/set stop none", SUM)
    chat = model.chat()
    answers = [chat.send(SUM, max_new_tokens=3, stop=stop).text for stop in ("plus", ())]
    assert out == "".join(f"{answer}\n" for answer in answers)
    assert err.startswith("max_new_tokens is now 3.\nstop is now plus.\n")


def test_options_are_listed_and_bad_ones_refused(talk):
    out, err = talk(
        "/set temperature 0.8", "/set temperature -1", "/set warmth 3", "/set top_k", "/set logprobs 3", "/set"
    )
    assert {"temperature 0.8", "top_k none", "max_new_tokens 64", "long_audio error"} <= {*out.splitlines()}
    told = ["is now 0.8", "Error: temperature", "option 'warmth'", "as in: /set top_k none", "option 'logprobs'"]
    assert all(part in line for part, line in zip(told, err.splitlines(), strict=True))


def test_a_refused_option_is_told_as_it_is_set(talk, tmp_path):
    with wave.open(str(file := tmp_path / "long.wav"), "wb") as sound:
        sound.setparams((1, 2, 16_000, 0, "NONE", ""))
        sound.writeframes(bytes(range(256)) * (2 * 31 * 16_000 // 256))
    _, err = talk(f"/audio {file}", "/set long_audio split", f"/audio {file}")
    refused, _, attached = err.splitlines()
    assert refused.startswith("Error: ") and "give /set long_audio split to split it" in refused
    assert attached == f"Attached audio {file} (31.0 s)."


def test_what_is_set_comes_before_the_sampling_of_the_checkpoint(talk, submitted):
    out, _ = talk("/set", SUM, "/set temperature 0.5", SUM, "/set sampling greedy", SUM, sampling="default")
    assert {"sampling default", "temperature 1.0", "top_k 64", "top_p 0.95"} <= {*out.splitlines()}
    values = [(options.temperature, options.top_k, options.top_p) for options in submitted]
    assert values == [(1.0, 64, 0.95), (0.5, 64, 0.95), (0.5, None, None)]


def test_retry_answers_the_last_message_again(talk):
    out, _ = talk(
        f"/image {PICTURE}", LOOK, "/set max_new_tokens 3", "/retry", "/set max_new_tokens 64", "/retry", COUNT
    )
    first, second, third, fourth = out.splitlines(keepends=True)
    assert first == third == SHAPES and SHAPES.startswith(second.strip()) and second != SHAPES
    assert fourth == THREE, "the conversation holds the message once"
    assert talk("/retry")[1] == "Error: There is no message to answer again; ask something first.\n"


def test_ctrl_c_stops_an_answer_and_retry_asks_again(talk, interrupted):
    out, _ = talk(SUM, KeyboardInterrupt(), "/retry", COUNT)
    stopped, _, rest = out.partition(" (stopped; /retry asks again)\n")
    assert PLUS.startswith(stopped) and stopped != PLUS
    assert rest.startswith("\n" + PLUS)


def test_a_retry_that_is_stopped_keeps_the_answer(talk, interrupted, tmp_path):
    file = tmp_path / "chat.json"
    talk("/set max_new_tokens 2", SUM, "/set max_new_tokens 64", "/retry", f"/save {file}")
    question, answer = json.loads(file.read_text())
    assert question["content"] == SUM and PLUS.startswith(answer["content"]) and len(answer["content"]) < 10


def test_a_conversation_is_saved_and_continued(talk, model, tmp_path, monkeypatch):
    file = tmp_path / "chat.json"
    monkeypatch.chdir(DEMO)
    out, err = talk("/system You are Ada.", "/image picture.png", LOOK, f"/save {file}", SUM, "/save")
    assert err.endswith(f"Saved 1 turn to {file}.\nSaved 2 turns to {file}.\n")
    messages = json.loads(file.read_text())
    assert [each["role"] for each in messages] == ["system", "user", "assistant", "user", "assistant"]
    asked = [*messages[:3], {"role": "user", "content": COUNT}]
    counted = model.generate(asked, max_new_tokens=64).text
    monkeypatch.chdir(tmp_path)
    file.write_text(json.dumps(messages[:3]))
    out, err = talk("Hello", f"/load {file}", COUNT, "/save")
    shown = f"> [{PICTURE}] {LOOK}\n{messages[2]['content']}\n"
    assert out.partition("\n")[2] == shown + counted + "\n"
    assert err == f"Loaded 1 turn from {file}.\nSaved 2 turns to {file}.\n"


def test_files_are_neither_lost_nor_half_written(talk, tmp_path):
    other, folder = tmp_path / "other.txt", tmp_path / "none" / "chat.json"
    other.write_text("precious")
    _, err = talk("/save", f"/save {folder}", SUM, "/save", f"/save {other}", f"/save {folder}", "/load", SUM)
    told = [
        "Give a file",
        "no answer to save yet",
        "Give a file",
        "other.txt exists",
        "cannot be written",
        "Give a file",
    ]
    assert all(part in line for part, line in zip(told, err.splitlines(), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["other.txt"] and other.read_text() == "precious"


def test_a_file_that_is_no_conversation_changes_nothing(talk, tmp_path):
    answer = {"role": "assistant", "content": "b"}
    look = {"role": "user", "content": [{"type": "image", "image": "gone.png"}]}
    texts = (
        "{",
        '{"a": 1}',
        "[]",
        json.dumps([look]),
        json.dumps([{"role": "king"}, answer]),
        json.dumps([look, answer]),
        json.dumps([answer, {"role": "user", "content": "a"}, answer]),
        json.dumps([{"role": "user", "content": "\ud800"}, answer]),
        "[" * 100_000,
    )
    files = [tmp_path / f"{number}.json" for number in range(len(texts))]
    for file, text in zip(files, texts):
        file.write_text(text)
    out, err = talk(f"/image {PICTURE}", LOOK, *(f"/load {file}" for file in [*files, tmp_path / "none.json"]), COUNT)
    assert out == SHAPES + THREE
    told = [
        "not JSON",
        "not a list",
        "not an answer",
        "not an answer",
        "role 'king'",
        "no file 'gone.png'",
        "begins with an answer",
        "not JSON",
        "not JSON",
        "cannot be read",
    ]
    assert all(part in line for part, line in zip(told, err.splitlines()[1:], strict=True))


def test_a_conversation_of_another_program_is_shown_as_text(talk, tmp_path):
    picture = "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()
    parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "Look\x1b]0;title\x07"}]
    messages = [
        {"role": "developer", "content": "You are Ada."},
        {"role": "user", "content": parts},
        {"role": "assistant"},
    ]
    source, copy = tmp_path / "a.json", tmp_path / "b.json"
    source.write_text(json.dumps(messages))
    assert talk(f"/load {source}", f"/save {copy}")[0] == "> [image_url] Look�]0;title�\n\n"
    saved = json.loads(copy.read_text())
    assert saved == [{"role": "system", "content": "You are Ada."}, messages[1], {"role": "assistant", "content": ""}]


def test_a_file_name_that_is_not_text_leaves_no_half_file(tmp_path):
    picture = {"type": "image", "image": os.fsdecode(b"/\xff.png")}
    with pytest.raises(ChatFileError, match="a file name in it is not Unicode"):
        write_chat([{"role": "user", "content": [picture]}], tmp_path / "chat.json")
    assert [*tmp_path.iterdir()] == []


def test_a_full_context_is_told_or_drops_the_oldest_turns(talk, model):
    context = model.manifest.max_context
    question = [{"role": "user", "content": SUM}]
    room = context - len(model.encode(question)) - 5
    out, err = talk(SUM, SUM, max_new_tokens=room)
    assert out == PLUS and "the context of 4,096" in err and "/reset" in err and "--drop-oldest" in err
    out, err = talk(SUM, "What is 5 plus 6?", "/retry", drop_oldest=True, max_new_tokens=room)
    alone = model.generate([{"role": "user", "content": "What is 5 plus 6?"}], max_new_tokens=64).text + "\n"
    assert out == PLUS + 2 * alone
    assert err == "The context is full; the oldest turn was dropped.\n"
    out, err = talk("What " * context, drop_oldest=True)
    assert out == "" and err.startswith("Error: The prompt has"), "there is nothing to drop"


def test_an_answer_cannot_steer_the_terminal(capsys):
    PlainTerminal().show(["a\x1b]0;title\x07", "b\x9b31m\r\n\tc"])
    assert capsys.readouterr().out == "a�]0;title�b�31m\n\tc\n"


def test_the_command_reads_from_a_pipe(demo_artifact, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{SUM}\n/exit\n"))
    outcome = run_command(monkeypatch, ["gemma3n", "chat", str(demo_artifact("E2B")), "--temperature", "0"])
    assert (outcome.code, outcome.out, outcome.err) == (0, PLUS, "")
