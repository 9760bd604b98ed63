"""What `--report` says of each tensor, against artifacts and transformers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.export.quantization.config import QuantizationConfig
from gemma3n_onnx.export.quantization.quantize import dequantize, quantize
from gemma3n_onnx.export.quantization.sensitivity import sensitivities
from gemma3n_onnx.export.slicing import whole
from gemma3n_onnx.export.text_weights import TOKENS
from gemma3n_onnx.export.verify.reference import stored_in, unchanged
from gemma3n_onnx.export.weights import read_cut
from gemma3n_onnx.runtime.artifact import load_manifest
from oracle import kl_divergence, load_oracle, oracle_logits, random_prompt
from support import run_command

PROMPTS = [random_prompt(24, seed=1), random_prompt(31, seed=2)]
DOWN = "layers.3.mlp.down_proj.weight"
FOUR_BITS = QuantizationConfig(4, 32)


@pytest.fixture(scope="module")
def checkpoint(shallow_checkpoint):
    return Checkpoint.open(shallow_checkpoint)


def measured(checkpoint, storage_of):
    steps = []
    chosen = whole(checkpoint.text_config)
    found = sensitivities(checkpoint, chosen, "int4", storage_of, PROMPTS, lambda done, of: steps.append((done, of)))
    assert steps[-1][0] == steps[-1][1] == len(found.tensors) + 1
    return found


def test_one_tensor_costs_what_transformers_says(checkpoint, shallow_checkpoint):
    found = measured(checkpoint, lambda name: FOUR_BITS if name == DOWN else unchanged(name))
    (tensor,) = found.tensors
    assert tensor.name == DOWN and tensor.scheme == str(FOUR_BITS)
    weight = read_cut(checkpoint, whole(checkpoint.text_config).source_of(DOWN)).float()
    stored = dequantize(quantize(weight, FOUR_BITS), FOUR_BITS)
    assert tensor.error == pytest.approx(float((stored - weight).norm() / weight.norm()), rel=1e-4)
    oracle = load_oracle(shallow_checkpoint)
    before = [oracle_logits(oracle, ids) for ids in PROMPTS]
    oracle.get_parameter(f"model.{DOWN}").data = stored
    kl = np.concatenate([kl_divergence(b, oracle_logits(oracle, ids)) for b, ids in zip(before, PROMPTS)]).mean()
    assert tensor.kl == pytest.approx(float(kl), rel=1e-3)
    assert found.kl_all == pytest.approx(tensor.kl, rel=1e-3)


def test_fewer_bits_cost_more_and_every_tensor_is_there(checkpoint, exported, shallow_checkpoint):
    manifests = {p: load_manifest(exported(shallow_checkpoint, precision=p)) for p in ("int8", "int4")}
    found = {p: measured(checkpoint, stored_in(manifest)) for p, manifest in manifests.items()}
    for precision, manifest in manifests.items():
        assert {tensor.name for tensor in found[precision].tensors} == set(manifest.quantization)
        costs = [tensor.kl for tensor in found[precision].tensors]
        assert costs == sorted(costs, reverse=True) and min(costs) >= 0
    assert found["int4"].kl_all > 4 * found["int8"].kl_all
    print({p: f"KL {of.kl_all:.1e} nats, worst {of.tensors[0].name} {of.tensors[0].kl:.1e}" for p, of in found.items()})


def test_the_command_writes_a_report(monkeypatch, small_checkpoint, tmp_path):
    report, prompts = tmp_path / "report.json", tmp_path / "prompts.txt"
    prompts.write_text("One two three\n\nfour five\n")
    command = [
        "gemma3n-export",
        "--model",
        str(small_checkpoint),
        "--precision",
        "int4",
        "--output",
        str(tmp_path / "a"),
    ]
    outcome = run_command(monkeypatch, [*command, "--report", str(report), "--report-prompts", str(prompts)])
    assert outcome.code == 0, outcome.err
    found = json.loads(report.read_text())
    manifest = load_manifest(tmp_path / "a")
    assert {tensor["name"] for tensor in found["tensors"]} == set(manifest.quantization)
    assert f"{found['kl_all']:.2e} nats" in outcome.out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--report", "r.json"], "--report needs a quantized --precision, not fp32."),
        (["--precision", "int4", "--report", "none/r.json"], "none/r.json cannot be written"),
        (["--precision", "int4", "--report", "r.json", "--report-prompts", "p.txt"], "p.txt cannot be read as text"),
        (["--precision", "int4", "--report", "r.json", "--report-prompts", "empty.txt"], "empty.txt has no prompts"),
    ],
)
def test_what_cannot_be_reported_is_told_before_the_export(monkeypatch, small_checkpoint, tmp_path, options, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    command = ["gemma3n-export", "--model", str(small_checkpoint), "--output", str(tmp_path / "a"), *options]
    outcome = run_command(monkeypatch, command)
    assert outcome.code == 1
    assert told in outcome.err
    assert not (tmp_path / "a").exists()


def test_the_token_table_of_a_checkpoint_with_encoders_is_there(small_full_checkpoint):
    checkpoint = Checkpoint.open(small_full_checkpoint)
    found = measured(checkpoint, lambda name: FOUR_BITS if name == TOKENS else unchanged(name))
    (tensor,) = found.tensors
    assert tensor.name == TOKENS and tensor.kl > 0
    assert tensor.kl == pytest.approx(found.kl_all, rel=1e-3)
