"""`gemma3n run`: prompts from standard input, answers as JSON."""

from __future__ import annotations

import io
import json
import sys
import warnings
from pathlib import Path

import pytest

from gemma3n_onnx.runtime import GenerationOptions, OnnxGemma3n
from gemma3n_onnx.runtime.generation.stream import GenerationStream
from support import Outcome, run_command

OPTIONS = ("--max-new-tokens", "12")
CLOSED = "Standard input is closed; give the prompt as an argument, or pipe it in."


@pytest.fixture
def gemma3n(monkeypatch: pytest.MonkeyPatch):
    def run(*arguments: object, typed: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
        return run_command(monkeypatch, ["gemma3n", "run", *map(str, arguments)])

    return run


@pytest.mark.parametrize("typed", ["Hello\n", "Hello", "Hello\r\n", "Zwei\nZeilen ü 👩‍👩‍👧\n"])
def test_a_prompt_from_standard_input(gemma3n, small_artifact: Path, typed: str) -> None:
    for raw in ([], ["--raw"]):
        wanted = gemma3n(small_artifact, typed.rstrip(), *raw, *OPTIONS)
        assert wanted.code == 0
        assert gemma3n(small_artifact, "-", *raw, *OPTIONS, typed=typed.encode()) == wanted


def test_only_the_newline_at_the_end_is_left_out(gemma3n, small_artifact: Path) -> None:
    answer = gemma3n(small_artifact, "-", "--raw", "--json", *OPTIONS, typed=b" a \n\n")
    wanted = OnnxGemma3n.from_pretrained(small_artifact).encode(" a \n").ids
    assert json.loads(answer.out)["prompt_token_ids"] == wanted


def test_a_prompt_from_a_file(gemma3n, small_artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("Zwei\nZeilen ü\n", encoding="utf-8-sig")
    wanted = gemma3n(small_artifact, "Zwei\nZeilen ü", *OPTIONS)
    assert wanted.code == 0
    assert gemma3n(small_artifact, "--prompt-file", file, *OPTIONS) == wanted
    assert gemma3n(small_artifact, "--prompt-file", "-", *OPTIONS, typed=file.read_bytes()) == wanted


def test_a_prompt_file_that_cannot_be_used(gemma3n, small_artifact: Path, tmp_path: Path) -> None:
    (file := tmp_path / "prompt.txt").write_bytes(b"\xff\xfe")
    for arguments, code, says in (
        (["--prompt-file", file], 1, f"{file} is not UTF-8 text"),
        (["--prompt-file", tmp_path / "none"], 2, "none' does not exist"),
        (["Hello", "--prompt-file", file], 2, "either PROMPT, - for standard input, or --prompt-file"),
        ([], 2, "either PROMPT, - for standard input, or --prompt-file"),
    ):
        outcome = gemma3n(small_artifact, *arguments)
        assert outcome.code == code and says in outcome.err, outcome


@pytest.mark.parametrize(
    ("typed", "says"), [(b"", "The prompt is empty"), (b"\n", "The prompt is empty"), (b"\xff\xfe", "not UTF-8 text")]
)
def test_standard_input_without_a_prompt(gemma3n, small_artifact: Path, typed: bytes, says: str) -> None:
    outcome = gemma3n(small_artifact, "-", typed=typed)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("Error: ") and says in outcome.err and outcome.err.count("\n") == 1


def test_standard_input_may_begin_with_a_byte_order_mark(gemma3n, small_artifact: Path) -> None:
    marked, plain = (
        gemma3n(small_artifact, "-", "--raw", *OPTIONS, typed=typed) for typed in (b"\xef\xbb\xbfHello\n", b"Hello")
    )
    assert marked == plain and marked.code == 0


def test_closed_standard_input(monkeypatch: pytest.MonkeyPatch, small_artifact: Path) -> None:
    """As Python has it after `<&-`."""
    monkeypatch.setattr(sys, "stdin", None)
    outcome = run_command(monkeypatch, ["gemma3n", "run", str(small_artifact), "-"])
    assert outcome == Outcome(1, "", f"Error: {CLOSED}\n")


def test_json_is_the_result(gemma3n, small_artifact: Path) -> None:
    outcome = gemma3n(small_artifact, "Hello", "--json", *OPTIONS)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("\n") == 1
    made = json.loads(outcome.out)
    messages = [{"role": "user", "content": "Hello"}]
    wanted = OnnxGemma3n.from_pretrained(small_artifact).generate(messages, max_new_tokens=12)
    assert made["text"] == wanted.text
    assert made["token_ids"] == list(wanted.token_ids)
    assert made["prompt_token_ids"] == list(wanted.prompt_token_ids)
    assert made["finish_reason"] == wanted.finish_reason == "length"
    assert made["timings"]["prefill_tokens"] == len(wanted.prompt_token_ids)
    assert made["timings"]["decode_tokens"] == 11
    assert made["timings"]["decode_tokens_per_second"] > 0 < made["timings"]["time_to_first_token"]
    assert made["warnings"] == []


def test_json_has_the_warnings_and_stderr_the_statistics(
    gemma3n, small_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = GenerationStream._run

    def warned(self: GenerationStream):
        warnings.warn("The sun is low.", stacklevel=1)
        return run(self)

    monkeypatch.setattr(GenerationStream, "_run", warned)
    outcome = gemma3n(small_artifact, "Hello", "--json", "--stats", *OPTIONS)
    assert json.loads(outcome.out)["warnings"] == ["The sun is low."]
    assert outcome.err.startswith("prefill ") and outcome.err.count("\n") == 1


def test_an_error_leaves_stdout_empty(gemma3n, small_artifact: Path) -> None:
    outcome = gemma3n(small_artifact, "Hello " * 300, "--json")
    assert (outcome.code, outcome.out) == (1, "")
    assert "context of 256" in outcome.err


@pytest.mark.parametrize(
    ("flags", "used"),
    [
        ([], (0.0, None, None)),
        (["--temperature", "0.5"], (0.5, None, None)),
        (["--sampling", "default"], (1.0, 64, 0.95)),
        (["--sampling", "default", "--temperature", "0.5", "--top-k", "3"], (0.5, 3, 0.95)),
    ],
)
def test_sampling_is_greedy_unless_asked(
    gemma3n, small_artifact: Path, submitted: list[GenerationOptions], flags: list[str], used: tuple
) -> None:
    assert gemma3n(small_artifact, "Hello", *flags, *OPTIONS).code == 0
    assert [(o.temperature, o.top_k, o.top_p) for o in submitted] == [used]


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        (["--top-p", "0.9", "--min-p", "0.1"], "--top-p, --min-p"),
        (["--sampling", "default", "--temperature", "0", "--top-k", "5"], "--top-k"),
        (["--top-p", "0.9", "--temperature", "0.5"], ""),
        (["--sampling", "default", "--top-p", "0.9"], ""),
        ([], ""),
    ],
)
def test_sampling_options_without_effect_are_told(gemma3n, small_artifact: Path, options: list[str], idle: str) -> None:
    outcome = gemma3n(small_artifact, "Hello", *options, *OPTIONS)
    told = f"Warning: {idle} without effect at temperature 0; add --temperature.\n" if idle else ""
    assert (outcome.code, outcome.err) == (0, told)
