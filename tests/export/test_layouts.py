"""A layout is one class and one entry in the table: nothing else in the exporter knows its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from gemma3n_onnx.export import layouts
from gemma3n_onnx.export.errors import ExportOptionError
from gemma3n_onnx.export.layouts import select
from gemma3n_onnx.export.layouts.base import GRAPHS, ConfigFiles, Layout, Requested
from gemma3n_onnx.graphs.config import TextConfig
from gemma3n_onnx.graphs.passes.name_axes import NameAxes
from gemma3n_onnx.runtime.artifact import Manifest
from support import Outcome, concrete_subclasses, run_command

ROOT = Path(__file__).parents[2]


class FakeLayout(Layout):
    name = "fake"
    marker = "graphs/text.onnx"
    folder = "graphs"
    modalities = ("text",)

    def check(self, requested: Requested) -> None:
        if requested.precision != "fp32":
            raise ExportOptionError("--layout fake is for --precision fp32.")

    def graph_files(self, precision: str) -> Mapping[str, str]:
        return {"decoder": "text.onnx", "embedding": "ids.onnx"}

    def adapt(self, decoder: ir.Model, embedding: ir.Model, config: TextConfig) -> None:
        NameAxes({"batch": "rows"})(decoder)

    def config_files(self, model_config: Mapping[str, Any], manifest: Manifest, config: TextConfig) -> ConfigFiles:
        return {"fake.json": {"layers": config.num_layers, "decoder": manifest.decoder.file}}


@pytest.fixture(autouse=True)
def fake_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(select.LAYOUTS, FakeLayout.name, FakeLayout())


def run_export(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, output: Path, *options: str) -> Outcome:
    command = ["gemma3n-export", "--model", str(checkpoint), "--output", str(output), *options]
    return run_command(monkeypatch, command)


def test_a_new_layout_is_exported(monkeypatch: pytest.MonkeyPatch, small_full_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    outcome = run_export(monkeypatch, small_full_checkpoint, output, "--layout", "fake")
    assert outcome.code == 0, outcome.err
    assert {path.name for path in (output / "graphs").iterdir()} == {
        "decoder.onnx.data",
        "ids.onnx",
        "per_layer_embeddings.bin",
        "text.onnx",
        "token_embeddings.bin",
    }
    written = {path.name for path in output.iterdir()}
    assert {"fake.json", "tokenizer.json"} <= written
    assert not written & {"config.json", "genai_config.json", "manifest.json"}
    assert json.loads((output / "fake.json").read_text()) == {"layers": 3, "decoder": "text.onnx"}
    decoder, embedding = (ir.load(output / "graphs" / name).graph for name in ("text.onnx", "ids.onnx"))
    assert decoder.inputs[0].shape is not None and str(decoder.inputs[0].shape[0]) == "rows"
    assert [value.name for value in embedding.inputs] == ["input_ids"]
    capacities = {str(value.shape[2]) for value in decoder.inputs if str(value.name).startswith("past")}
    assert capacities == {"capacity"}

    refused = run_export(monkeypatch, small_full_checkpoint, output, "--layout", "fake")
    assert refused.code == 1 and "exists already" in refused.err
    outcome = run_export(monkeypatch, small_full_checkpoint, output, "--layout", "fake", "--force")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--layout", "fake", "--precision", "int4"), "--layout fake is for --precision fp32"),
        (("--layout", "gguf"), f"choose {', '.join([*select.LAYOUTS, 'fake'])}"),
    ],
)
def test_a_new_layout_is_checked(
    monkeypatch: pytest.MonkeyPatch, small_full_checkpoint: Path, tmp_path: Path, options: tuple[str, ...], told: str
) -> None:
    outcome = run_export(monkeypatch, small_full_checkpoint, tmp_path / "out", *options)
    assert outcome.code == 1 and told in outcome.err
    assert not (tmp_path / "out").exists()


def test_every_layout_has_a_name_and_marker_of_its_own() -> None:
    assert len({layout.name for layout in select.BUILT_IN}) == len(select.BUILT_IN)
    assert len({layout.marker for layout in select.BUILT_IN}) == len(select.BUILT_IN)


@pytest.mark.parametrize("layout", select.BUILT_IN, ids=lambda layout: layout.name)
def test_every_layout_names_files_of_known_graphs(layout: Layout) -> None:
    files = layout.graph_files("fp32")
    assert "decoder" in files and files.keys() <= {*GRAPHS}
    assert len({*files.values()}) == len(files)


def test_a_layout_without_a_prefill_graph_has_no_weights_of_one(
    monkeypatch: pytest.MonkeyPatch, small_checkpoint: Path, tmp_path: Path
) -> None:
    class Quantized(FakeLayout):
        def check(self, requested: Requested) -> None:
            pass

    monkeypatch.setitem(select.LAYOUTS, "fake", Quantized())
    output = tmp_path / "out"
    outcome = run_export(monkeypatch, small_checkpoint, output, "--layout", "fake", "--precision", "int4")
    assert outcome.code == 0, outcome.err
    assert not [path.name for path in output.rglob("prefill*")]


def test_every_layout_is_in_the_table_and_in_the_pages() -> None:
    assert {type(layout) for layout in select.BUILT_IN} == concrete_subclasses(Layout, layouts)
    for page in ("README.md", "docs/formats.md"):
        text = (ROOT / page).read_text()
        named = [name for name in select.LAYOUTS if name not in (select.DEFAULT, FakeLayout.name)]
        assert [name for name in named if f"--layout {name}" not in text] == [], page
