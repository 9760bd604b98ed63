"""The chat template of an artifact: the checkpoint's, another, or none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gemma3n_onnx.runtime import OnnxGemma3n, PromptError
from support import Outcome, run_command

OURS = "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"
MESSAGES = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "?"},
]
ONE_TOKEN = ("--max-new-tokens", "1")


@pytest.fixture(scope="module")
def bare_checkpoint(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a chat template."""
    folder = Path(shutil.copytree(small_checkpoint, tmp_path_factory.mktemp("bare") / "bare"))
    (folder / "chat_template.jinja").unlink()
    return folder


def exported(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, output: Path, *options: str) -> Outcome:
    command = ["gemma3n-export", "--model", str(checkpoint), "--output", str(output), *options]
    return run_command(monkeypatch, command)


def test_a_missing_template_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, bare_checkpoint: Path, tmp_path: Path
) -> None:
    outcome = exported(monkeypatch, bare_checkpoint, tmp_path / "out", "--quiet")
    assert (outcome.code, outcome.out) == (0, "")
    (warning,) = outcome.err.splitlines()
    assert warning.startswith("Warning: the checkpoint has no chat template") and "--chat-template FILE" in warning
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    model = OnnxGemma3n.from_pretrained(tmp_path / "out")
    with pytest.raises(PromptError, match="load it with chat_template=FILE, export it with one") as caught:
        model.generate(MESSAGES)
    assert "\n" not in str(caught.value)
    with pytest.raises(PromptError, match="cannot chat"):
        model.chat()
    run = ["gemma3n", "run", str(tmp_path / "out"), "Hello", *ONE_TOKEN]
    assert run_command(monkeypatch, run) == run_command(monkeypatch, [*run, "--raw"])
    file = tmp_path / "ours.jinja"
    file.write_text(OURS)
    given = OnnxGemma3n.from_pretrained(tmp_path / "out", chat_template=file)
    assert given.encode(MESSAGES).ids == reference(bare_checkpoint)
    assert run_command(monkeypatch, [*run, "--chat-template", str(file)]).code == 0


@pytest.mark.parametrize("checkpoint", ["bare_checkpoint", "small_checkpoint"])
def test_the_option_gives_the_template(
    monkeypatch: pytest.MonkeyPatch, checkpoint: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(checkpoint)
    file = tmp_path / "ours.jinja"
    file.write_text(OURS)
    outcome = exported(monkeypatch, folder, tmp_path / "out", "--quiet", "--chat-template", str(file))
    assert outcome == Outcome(0, "", "")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == OURS
    assert OnnxGemma3n.from_pretrained(tmp_path / "out").encode(MESSAGES).ids == reference(folder)


def reference(checkpoint: Path) -> list[int]:
    """transformers' ids of the messages in the template `OURS`."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return tokenizer.apply_chat_template(MESSAGES, chat_template=OURS, return_dict=False)


def test_another_template_than_the_artifacts(small_artifact: Path, small_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "ours.jinja"
    file.write_text(OURS)
    own, given = (OnnxGemma3n.from_pretrained(small_artifact, chat_template=each) for each in (None, str(file)))
    assert given.encode(MESSAGES).ids == reference(small_checkpoint) != own.encode(MESSAGES).ids
