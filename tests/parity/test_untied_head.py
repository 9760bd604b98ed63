"""A checkpoint whose output head is not its token embedding, in every precision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.export.checkpoint.sizes import parameter_counts
from gemma3n_onnx.export.quantization.config import QuantizationConfig
from gemma3n_onnx.export.quantization.quantize import dequantize, quantize
from gemma3n_onnx.export.quantization.sensitivity import sensitivities
from gemma3n_onnx.export.slicing import whole
from gemma3n_onnx.export.text_weights import HEAD, TOKENS
from gemma3n_onnx.export.trace import DTYPES
from gemma3n_onnx.export.verify.parity import describe, verify
from gemma3n_onnx.runtime import OnnxGemma3n
from gemma3n_onnx.runtime.artifact import load_manifest
from oracle import (
    LONG,
    TOLERANCE,
    assert_close,
    generate_greedily,
    kl_divergence,
    load_oracle,
    oracle_logits,
    oracle_tokens,
    random_prompt,
)

STEPS = 32


def test_it_equals_transformers(untied_checkpoint, exported, untied_oracle):
    model = OnnxGemma3n.from_pretrained(exported(untied_checkpoint))
    ours = generate_greedily(model, random_prompt(LONG, seed=3, vocab_size=1280), STEPS)
    theirs = oracle_logits(untied_oracle, ours.oracle_ids, STEPS)
    assert_close("untied head", ours.logits, theirs, TOLERANCE)
    assert ours.tokens == oracle_tokens(untied_oracle, ours.prompt, STEPS)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_narrow_storage_equals_transformers_on_rounded_weights(untied_checkpoint, exported, precision):
    model = OnnxGemma3n.from_pretrained(exported(untied_checkpoint, precision=precision))
    ours = generate_greedily(model, random_prompt(LONG, seed=3), STEPS)
    rounded = load_oracle(untied_checkpoint)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(DTYPES[precision]))
    theirs = oracle_logits(rounded, ours.oracle_ids, STEPS)
    assert_close(f"untied head in {precision}", ours.logits, theirs, TOLERANCE)


@pytest.mark.parametrize("precision", ["int8", "mixed", "int4"])
def test_quantized_equals_transformers_on_dequantized_weights(untied_checkpoint, exported, precision):
    model = OnnxGemma3n.from_pretrained(exported(untied_checkpoint, precision=precision))
    assert model.manifest.quantization[HEAD] == model.manifest.quantization[TOKENS]
    parity = verify(model, Checkpoint.open(untied_checkpoint), None, None, [random_prompt(LONG, seed=8)], STEPS)
    print(describe(parity))
    assert parity.passed and parity.tolerance == TOLERANCE
    assert parity.graph.rounded is not None and parity.graph.rounded.exact.greedy_agreement == 1


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_the_manifest_counts_the_head(untied_checkpoint, shallow_checkpoint, exported, untied_oracle, precision):
    untied, tied = (load_manifest(exported(c, precision=precision)) for c in (untied_checkpoint, shallow_checkpoint))
    config = Checkpoint.open(untied_checkpoint).text_config
    assert untied.parameters.text == untied_oracle.num_parameters() + parameter_counts(config).unused_kv
    assert untied.parameters.effective - tied.parameters.effective == tied.parameters.token_embeddings
    assert untied.step_bytes == tied.step_bytes
    assert untied.token_embeddings == tied.token_embeddings


def test_the_head_lies_with_the_decoder(untied_checkpoint, exported):
    folder = exported(untied_checkpoint)
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    head = next(tensor for tensor in graph.initializer if tensor.name == HEAD)
    assert {entry.key: entry.value for entry in head.external_data}["location"] == "decoder.onnx.data"
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_two_tensors_are_read_as_they_are_though_the_config_ties_them(
    untied_checkpoint, exported, untied_oracle, tmp_path: Path
):
    """As PEFT leaves them that trained both."""
    folder = shutil.copytree(untied_checkpoint, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    ids = random_prompt(LONG)
    np.testing.assert_array_equal(oracle_logits(load_oracle(folder), ids), oracle_logits(untied_oracle, ids))
    for name in ("decoder.onnx", "decoder.onnx.data", "token_embeddings.bin", "config.json"):
        assert (exported(folder) / name).read_bytes() == (exported(untied_checkpoint) / name).read_bytes()


def test_a_report_quantizes_each_alone(untied_checkpoint, untied_oracle):
    checkpoint, bits = Checkpoint.open(untied_checkpoint), QuantizationConfig(4, 32)
    prompt = random_prompt(24, seed=1)
    found = sensitivities(
        checkpoint,
        whole(checkpoint.text_config),
        "int4",
        lambda name: bits if name in (HEAD, TOKENS) else "fp32",
        [prompt],
        lambda *_: None,
    )
    before = oracle_logits(untied_oracle, prompt)
    costs = {tensor.name: tensor.kl for tensor in found.tensors}
    assert costs.keys() == {HEAD, TOKENS}
    for name, place in ((HEAD, HEAD), (TOKENS, f"model.{TOKENS}")):
        parameter = untied_oracle.get_parameter(place)
        original = parameter.data
        parameter.data = dequantize(quantize(original, bits), bits)
        kl = float(kl_divergence(before, oracle_logits(untied_oracle, prompt)).mean())
        parameter.data = original
        assert costs[name] == pytest.approx(kl, rel=1e-3)
