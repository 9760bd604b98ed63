"""A quantization recipe is one entry in the table: command line, messages and pages follow from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gemma3n_onnx.export.checkpoint.sizes import E4B
from gemma3n_onnx.export.options import ExportOptions, check_options
from gemma3n_onnx.export.quantization import recipes
from gemma3n_onnx.export.quantization.config import QuantizationConfig
from gemma3n_onnx.export.quantization.precision import Precision
from gemma3n_onnx.export.quantization.recipes import RECIPES, TARGETS
from gemma3n_onnx.export.text_weights import tensor_shapes
from gemma3n_onnx.runtime import OnnxGemma3n
from gemma3n_onnx.runtime.artifact import QuantizationInfo
from support import run_command

ROOT = Path(__file__).parents[2]
NAME = "hqq8"


def test_a_new_recipe_is_exported_and_verified(
    monkeypatch: pytest.MonkeyPatch, small_checkpoint: Path, tmp_path: Path
) -> None:
    recipe = Precision(
        storage="fp32",
        compute="fp32",
        weights=QuantizationConfig(8, 32, "hqq"),
        tokens=QuantizationConfig(8, 64),
        per_layer=QuantizationConfig(4, 16),
    )
    monkeypatch.setitem(recipes.RECIPES, NAME, {"cpu": recipe})
    output = tmp_path / "out"
    model = ["--model", str(small_checkpoint)]
    done = run_command(monkeypatch, ["gemma3n-export", *model, "--precision", NAME, "--output", str(output)])
    assert done.code == 0, done.err

    loaded = OnnxGemma3n.from_pretrained(output)
    manifest = loaded.manifest
    assert manifest.precision == NAME
    assert manifest.quantization["layers.0.mlp.up_proj.weight"] == QuantizationInfo(8, 32, "hqq")
    assert manifest.quantization["embed_tokens.weight"] == QuantizationInfo(8, 64, "rtn")
    assert manifest.quantization["embed_tokens_per_layer.weight"] == QuantizationInfo(4, 16, "rtn")
    assert manifest.prefill is None
    assert loaded.generate("Hello", max_new_tokens=4).token_ids

    lengths = ["--prompts", "1", "--prompt-tokens", "40", "--new-tokens", "8"]
    verified = run_command(monkeypatch, ["gemma3n", "verify", str(output), *model, *lengths])
    assert verified.code == 0, verified.out + verified.err
    assert f"the weights as stored in {NAME}" in verified.out and "PASS" in verified.out


def test_a_new_recipe_is_in_the_messages(
    monkeypatch: pytest.MonkeyPatch, small_checkpoint: Path, tmp_path: Path
) -> None:
    recipe = Precision(storage="fp32", compute="fp32", weights=QuantizationConfig(8, 32))
    monkeypatch.setitem(recipes.RECIPES, NAME, {"cpu": recipe})
    export = ["gemma3n-export", "--model", str(small_checkpoint), "--output", str(tmp_path / "out")]
    for options, told in (
        (["--precision", "int3"], f"choose one of {', '.join(RECIPES)}"),
        (["--precision", NAME, "--target", "cuda"], f"Precision {NAME} does not run on target cuda"),
        (["--precision", NAME, "--ple-bits", "8"], "--ple-bits needs a --precision that quantizes this table"),
        (["--precision", "fp32", "--ple-bits", "8"], f"int4, {NAME}"),
    ):
        done = run_command(monkeypatch, [*export, *options])
        assert done.code == 1 and told in done.err


def test_a_recipe_quantizes_both_tables_or_neither() -> None:
    with pytest.raises(ValueError, match="both tables or neither"):
        Precision(storage="fp32", compute="fp32", tokens=QuantizationConfig(8, 32))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_the_architecture(name: str) -> None:
    """Its targets exist, and each of its exceptions is a projection of the decoder."""
    modules = [tensor.removesuffix(".weight") for tensor in tensor_shapes(E4B)]
    assert RECIPES[name].keys() <= {*TARGETS} and RECIPES[name]
    for precision in RECIPES[name].values():
        for ending in precision.exceptions:
            assert any(module.endswith(ending) for module in modules), f"{ending} is no projection"


@pytest.mark.parametrize("target", TARGETS)
def test_an_export_without_a_precision_has_one_that_its_target_runs(target: str) -> None:
    name = ExportOptions(target=target).precision_name
    assert target in RECIPES[name]
    check_options(ExportOptions(target=target))


@pytest.mark.parametrize("wrong", [{"storage": "fp8"}, {"compute": "int8"}, {"encoders": "fp8"}])
def test_a_recipe_of_an_unknown_dtype_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="no dtype of a recipe"):
        Precision(**({"storage": "fp32", "compute": "fp32"} | wrong))


def test_help_and_page_name_every_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    told = run_command(monkeypatch, ["gemma3n-export", "--help"]).out
    assert ", ".join(RECIPES) in " ".join(told.split())
    lines = (ROOT / "docs" / "formats.md").read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("| `--precision` |"))
    assert re.findall(r"`--target (\w+)`", lines[begin]) == [*TARGETS]
    rows = iter(lines[begin + 2 :])
    names = []
    while (row := next(rows)).startswith("|"):
        names += re.findall(r"^\| `([^`]+)` \|", row)
    assert sorted(names) == sorted(RECIPES)


def test_the_readme_lists_every_recipe() -> None:
    """In the options of the exporter, and by target in the table of support."""
    rows = [
        line.split("|")[2:] for line in (ROOT / "README.md").read_text().splitlines() if "| `--precision` |" in line
    ]
    assert len(rows) == 2

    def names(cell: str) -> set[str]:
        return {*re.findall(r"`(\S+?)`", cell)}

    assert names(rows[0][0]) == RECIPES.keys()
    for target, cell in zip(TARGETS, rows[1]):
        assert names(cell) == {name for name, by_target in RECIPES.items() if target in by_target}, target
