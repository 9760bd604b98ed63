"""Perplexity: which token is scored in which window, and the figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from gemma3n_onnx.runtime import OnnxGemma3n
from gemma3n_onnx.runtime.evaluation.perplexity import perplexity, windows
from support import run_command

TEXT = "What is 3 plus 4? 3 plus 4 is 7.\nWhat is 5 plus 2? 5 plus 2 is 7.\n" * 4


@pytest.fixture(scope="module")
def model(demo_artifact) -> OnnxGemma3n:
    return OnnxGemma3n.from_pretrained(demo_artifact("E2B"))


@pytest.mark.parametrize(
    ("count", "size", "stride", "expected"),
    [
        (5, 10, 10, [(0, 0, 5)]),
        (10, 10, 10, [(0, 0, 10)]),
        (25, 10, 10, [(0, 0, 10), (10, 10, 20), (15, 20, 25)]),
        (14, 10, 3, [(0, 0, 10), (3, 10, 13), (4, 13, 14)]),
        (3, 1, 1, [(0, 0, 1), (1, 1, 2), (2, 2, 3)]),
    ],
)
def test_windows_score_each_token_once(count: int, size: int, stride: int, expected: list) -> None:
    assert [*windows(count, size, stride)] == expected


@pytest.mark.parametrize(("window", "stride"), [(2048, None), (16, None), (16, 4)])
def test_figures_are_those_of_the_windows(model: OnnxGemma3n, window: int, stride: int | None) -> None:
    ids = model.tokenizer.encode(TEXT, add_bos=False)
    size = window - 1
    total = 0.0
    for begin, first, end in windows(len(ids), size, stride or size):
        cache = model.engine.new_cache(1, window)
        prompt = [model.manifest.bos_token_id, *ids[begin:end]]
        logits = [model.engine.prefill(cache, 0, prompt[: 1 + first - begin]).copy()]
        steps = model.engine.step_runner(cache)
        for token in prompt[1 + first - begin : -1]:
            logits.append(steps.step(np.array([token]), np.array([True]))[0].copy())
        for row, token in zip(np.array(logits, np.float64), prompt[1 + first - begin :]):
            total += row[token] - row.max() - math.log(np.exp(row - row.max()).sum())
    seen: list[tuple[int, int]] = []
    found = perplexity(model, TEXT, window=window, stride=stride, progress=lambda *done: seen.append(done))
    error = abs(found.log_likelihood / total - 1)
    print(f"windows of {window}: relative error {error:.1e} against decode steps (tolerance 1e-5)")
    assert error < 1e-5
    assert (found.tokens, found.words, found.bytes) == (len(ids), len(TEXT.split()), len(TEXT))
    assert found.per_token == pytest.approx(math.exp(-total / len(ids)), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(-total / len(TEXT) / math.log(2), rel=1e-4)
    assert seen[-1] == (len(ids), len(ids))


def test_on_the_command_line(model: OnnxGemma3n, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    command = ["gemma3n", "perplexity", str(model.folder), str(file)]
    found = perplexity(model, TEXT)
    shown = run_command(monkeypatch, command)
    assert shown.code == 0 and f"perplexity {found.per_token:.4f} per token" in shown.out
    figures = json.loads(run_command(monkeypatch, [*command, "--json"]).out)
    assert figures["perplexity"] == pytest.approx(found.per_token) and figures["tokens"] == found.tokens


def test_a_file_is_scored_with_its_line_ends_and_without_its_byte_order_mark(
    model: OnnxGemma3n, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "text.txt"
    found = []
    for content in (b"3 plus\r\n4", b"\xef\xbb\xbf3 plus\r\n4"):
        file.write_bytes(content)
        shown = run_command(monkeypatch, ["gemma3n", "perplexity", str(model.folder), str(file), "--json"])
        found.append(json.loads(shown.out))
    assert found[0] == found[1] and found[0]["bytes"] == 9
    assert found[0]["log_likelihood"] == perplexity(model, "3 plus\r\n4").log_likelihood


def test_a_long_text_without_a_space_has_an_infinite_word_perplexity(
    model: OnnxGemma3n, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("字" * 99)
    command = ["gemma3n", "perplexity", str(model.folder), str(file)]
    assert "inf per word" in run_command(monkeypatch, command).out
    figures = json.loads(run_command(monkeypatch, [*command, "--json"]).out)
    assert figures["word_perplexity"] is None and figures["words"] == 1 and figures["perplexity"] > 1


@pytest.mark.parametrize(
    ("text", "options", "told"),
    [
        (b"", [], "The text is empty"),
        (b"\xff\xfe\x00", [], "is not UTF-8"),
        (b"a", ["--window", "1"], "window"),
        (b"a", ["--window", "1000000"], "exceeds the artifact's context"),
        (b"a", ["--window", "8", "--stride", "8"], "The stride is 8"),
        (b"a", ["--stride", "0"], "stride"),
    ],
)
def test_bad_input_is_told_in_a_sentence(
    model: OnnxGemma3n, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes, options: list[str], told: str
) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(text)
    outcome = run_command(monkeypatch, ["gemma3n", "perplexity", str(model.folder), str(file), *options])
    assert outcome.code != 0 and told in outcome.err and outcome.err.count("\n") == 1
