"""`gemma3n bench`: what it counts, and what it prints. No test looks at how fast anything is."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import onnx_ir as ir
import pytest
from PIL import Image

from gemma3n_onnx.runtime.artifact import load_manifest
from gemma3n_onnx.runtime.cli.measure import Figures, plot, read_bytes, table
from gemma3n_onnx.runtime.errors import OptionError
from support import run_command

SIZES = ["--prompt-tokens", "40", "--new-tokens", "3", "--context", "64", "--runs", "1"]
FIGURES = Figures(
    slice="E2B",
    precision="int4",
    provider="cpu",
    threads=2,
    prompt_tokens=1024,
    new_tokens=256,
    context=4096,
    load_seconds=1.5,
    prefill_tokens_per_second=100.0,
    decode_tokens_per_second=10.0,
    time_to_first_token=10.24,
    model_bytes=3_000_000_000,
    peak_bytes=2_000_000_000,
    private_bytes=1_500_000_000,
    gpu_bytes=None,
    read_bytes=2_000_000_000,
    bandwidth=40e9,
    mmlu=50.9,
)


def test_it_measures_each_artifact(monkeypatch: pytest.MonkeyPatch, small_artifact: Path, tmp_path: Path) -> None:
    picture = tmp_path / "plot.png"
    command = ["gemma3n", "bench", str(small_artifact), str(small_artifact), "--json", "--plot", str(picture), *SIZES]
    outcome = run_command(monkeypatch, command)
    assert outcome.code == 0, outcome.err
    both = json.loads(outcome.out)
    assert len(both) == 2
    for found in both:
        assert (found["prompt_tokens"], found["new_tokens"], found["context"]) == (40, 3, 64)
        assert min(found["prefill_tokens_per_second"], found["decode_tokens_per_second"], found["bandwidth"]) > 0
        assert found["time_to_first_token"] == pytest.approx(40 / found["prefill_tokens_per_second"])
        assert found["decode_limit"] == pytest.approx(found["bandwidth"] / found["read_bytes"])
        assert found["model_bytes"] == sum(i.bytes for i in load_manifest(small_artifact).files.values())
        assert found["mmlu"] is None and found["gpu_bytes"] is None
    with Image.open(picture) as image:
        assert image.format == "PNG" and min(image.size) > 200


def test_a_step_reads_the_weights_of_its_graph_and_what_attention_sees(small_artifact: Path) -> None:
    manifest = load_manifest(small_artifact)
    graph = ir.load(small_artifact / "decoder.onnx").graph
    weights = sum(
        v.const_value.nbytes for v in graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)
    )
    assert manifest.step_bytes == weights
    of_token = {cache.layer: 2 * cache.kv_heads * cache.head_dim * 4 for cache in manifest.caches}
    windows = {cache.layer: cache.attention_window for cache in manifest.caches}
    assert {window is None for window in windows.values()} == {True, False}
    for tokens in (1, 10_000):
        seen = sum(size * min(tokens, windows[layer] or tokens) for layer, size in of_token.items())
        assert read_bytes(manifest, tokens) == weights + seen


def test_the_table_has_the_columns_of_a_model_card() -> None:
    head, row = table([FIGURES]).splitlines()
    for name in ("prefill tok/s", "decode tok/s", "limit tok/s", "first token s", "model MB", "peak MB", "GPU MB"):
        assert name in head
    assert " ".join(row.split()) == "E2B int4 2 1024 256 100.0 10.0 20.0 50% 10.24 1.50 3000 2000 1500 -"


def test_a_plot_shows_published_accuracy_where_there_is_one(tmp_path: Path) -> None:
    widths = []
    for mmlu in (50.9, None):
        plot([replace(FIGURES, mmlu=mmlu)], tmp_path / "plot.png")
        with Image.open(tmp_path / "plot.png") as image:
            widths.append(image.width)
    assert widths[0] > widths[1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--prompt-tokens", "0"], "--prompt-tokens is 0; give a positive number."),
        (["--runs", "-1"], "--runs is -1"),
        (["--context", "100", "--prompt-tokens", "99"], "The prompt has 99 tokens and --new-tokens is 256"),
        (["--context", "100000"], "more than the context of 256"),
    ],
)
def test_sizes_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, small_artifact: Path, options: list[str], told: str
) -> None:
    outcome = run_command(monkeypatch, ["gemma3n", "bench", str(small_artifact), *options])
    assert outcome.code == 1
    assert told in outcome.err


def test_an_artifact_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    outcome = run_command(monkeypatch, ["gemma3n", "bench", str(tmp_path / "none")])
    assert outcome.code == 1
    assert "There is no artifact folder" in outcome.err


def test_a_plot_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be written"):
        plot([FIGURES], tmp_path / "none" / "plot.png")


def test_figures_survive_json() -> None:
    assert Figures(**json.loads(json.dumps(asdict(FIGURES)))) == FIGURES
