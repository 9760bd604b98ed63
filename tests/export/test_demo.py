"""The checkpoint that comes with the package, here one of its shape with random weights, and its own slices."""

import json
import shutil
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemma3n_onnx.export.checkpoint import hub
from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.export.errors import SliceError
from gemma3n_onnx.export.slicing import choose_slice
from gemma3n_onnx.runtime.artifact import load_manifest
from support import run_command, text_checkpoint

SHAPE = {
    "num_hidden_layers": 15,
    "num_kv_shared_layers": 10,
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 256,
}
TABLE = "slices.csv"
BLOCK = (5, 6, 7, 8, 9)
MIXED = (128, 256, 192, 128, 256, 128, 192, 256, 128, 192, 256, 256, 192, 128, 256)


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the slice table of the shipped one; tests must not write into it."""
    folder = text_checkpoint("tiny", tmp_path_factory.mktemp("packaged") / "demo", overrides=SHAPE)
    (folder / TABLE).write_bytes((resources.files("gemma3n_onnx.demo") / TABLE).read_bytes())
    return folder


@pytest.fixture(autouse=True)
def installed(packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "resources", SimpleNamespace(files={"gemma3n_onnx.demo": packaged}.__getitem__))
    monkeypatch.chdir(tmp_path)


def test_demo_is_the_packaged_checkpoint(packaged: Path) -> None:
    checkpoint = Checkpoint.open("demo")
    assert (checkpoint.folder, checkpoint.name) == (packaged, "demo")
    assert checkpoint.slice_table == packaged / TABLE


def test_a_local_folder_of_that_name_wins(packaged: Path, tmp_path: Path) -> None:
    shutil.copytree(packaged, tmp_path / "demo")
    assert Checkpoint.open("demo").folder.resolve() == tmp_path / "demo"


def test_a_local_file_of_that_name_does_not(packaged: Path, tmp_path: Path) -> None:
    (tmp_path / "demo").touch()
    assert Checkpoint.open("demo").folder == packaged


def test_a_checkpoint_without_a_table_has_none(small_checkpoint: Path) -> None:
    assert Checkpoint.open(small_checkpoint).slice_table is None


@pytest.mark.parametrize(
    ("name", "widths", "skipped"),
    [
        ("E4B", (256,) * 15, ()),
        ("E2B", (128,) * 10, BLOCK),
        ("half", (128,) * 15, ()),
        ("skip-block", (256,) * 10, BLOCK),
        ("mixed-layer", MIXED, ()),
        ("mixed-block", (128,) * 5 + (256,) * 5 + (128,) * 5, ()),
    ],
)
def test_every_slice_of_the_shipped_table_can_be_cut(
    name: str, widths: tuple[int, ...], skipped: tuple[int, ...]
) -> None:
    chosen = choose_slice(Checkpoint.open("demo"), name, None)
    assert (chosen.name, chosen.config.intermediate_sizes, chosen.skipped) == (name, widths, skipped)
    assert chosen.config.num_kv_layers == 5


def test_a_given_csv_goes_before_the_checkpoints_own(tmp_path: Path) -> None:
    table = tmp_path / "own.csv"
    table.write_text(f'name,layers,ffn_hidden_dims,layers_skipped\nhalf,15,"{[64] * 15}",\n')
    assert choose_slice(Checkpoint.open("demo"), "half", table).config.intermediate_sizes == (64,) * 15
    with pytest.raises(SliceError, match=r"no slice 'E2B' in .*own\.csv; its slices are half"):
        choose_slice(Checkpoint.open("demo"), "E2B", table)


def test_slices_lists_those_of_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = run_command(monkeypatch, ["gemma3n", "slices", "--model", "demo", "--json"])
    layers = {row["name"]: row["layers"] for row in json.loads(outcome.out)}
    assert layers == {"E4B": 15, "E2B": 10, "half": 15, "skip-block": 10, "mixed-layer": 15, "mixed-block": 15}


def test_a_slice_of_it_is_exported_and_verified_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["gemma3n-export", "--model", "demo", "--slice", "e2b", "--quiet"]
    assert run_command(monkeypatch, command).code == 0
    folder = tmp_path / "demo-e2b-fp32-cpu"
    manifest = load_manifest(folder)
    assert (manifest.source, manifest.slice, manifest.num_layers) == ("demo", "E2B", 10)
    assert not (folder / TABLE).exists()
    command = ["gemma3n", "verify", str(folder), "--model", "demo", "--prompts", "1", "--new-tokens", "4"]
    outcome = run_command(monkeypatch, command)
    assert "PASS" in outcome.out, outcome
