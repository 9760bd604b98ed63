"""The decoder for CUDA, run on the CPU: as it is in fp16, and with bf16, which the CPU lacks, made fp32."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.export.slicing import whole
from gemma3n_onnx.export.verify.reference import decoder_logits, load_decoder, stored_in
from gemma3n_onnx.runtime import OnnxGemma3n
from gemma3n_onnx.runtime.artifact import NEXT_LOGIT, NEXT_TOKEN, load_manifest
from gemma3n_onnx.runtime.engine.candidates import in_order
from gemma3n_onnx.runtime.engine.providers.cpu import CPUProvider
from gemma3n_onnx.runtime.engine.steps import DeviceSteps
from oracle import LONG, TOLERANCE, WINDOW, assert_close, generate_greedily, random_prompt
from support import record

STEPS = 24
WIDE = {ir.DataType.BFLOAT16: ir.DataType.FLOAT}


@pytest.fixture(scope="module")
def model(shallow_checkpoint, exported) -> OnnxGemma3n:
    return OnnxGemma3n.from_pretrained(exported(shallow_checkpoint, precision="fp16", target="cuda"), "cpu")


def answers(model: OnnxGemma3n, prepare) -> np.ndarray:
    """Logits [STEPS, 2, V] after prompts that are shorter and longer than the window."""
    cache = model.engine.new_cache(2, LONG + STEPS)
    for row, length in enumerate((40, LONG)):
        model.engine.prefill(cache, row, random_prompt(length, seed=row))
    decoder = model.engine.step_runner(cache)
    prepare(decoder)
    tokens = np.random.default_rng(3).integers(0, 200, (STEPS, 2))
    return np.stack([decoder.step(step, np.array([True, True])).copy() for step in tokens])


def test_the_mask_may_be_as_long_as_the_caches(model):
    """As it is while a recorded step is replayed, whose sizes never change."""

    def prepare(decoder):
        decoder._bound.mask_length = LONG + STEPS

    exact, long = answers(model, lambda _: None), answers(model, prepare)
    np.testing.assert_array_equal(exact, long)


def test_it_chooses_the_likeliest_token(model):
    token, logit = np.zeros((2, 1, 1), np.int64), np.zeros((2, 1, 1), np.float32)
    chosen = []

    def prepare(decoder):
        binding = decoder._bound.binding
        binding.output(NEXT_TOKEN, token)
        binding.output(NEXT_LOGIT, logit)
        run = binding.run
        binding.run = lambda: (run(), chosen.append((token[:, 0, 0].copy(), logit[:, 0, 0].copy())))

    logits = answers(model, prepare)
    assert len(chosen) == STEPS
    np.testing.assert_array_equal([tokens for tokens, _ in chosen], logits.argmax(-1))
    np.testing.assert_array_equal([largest for _, largest in chosen], logits.max(-1))


@pytest.mark.parametrize("options", [{"top_k": 40}, {"top_k": 100, "top_p": 0.9, "min_p": 0.01}])
def test_drawing_among_its_candidates_is_drawing(model, monkeypatch, options):
    """With the logits in a buffer, as on a device, and one copied to the host that must not be."""
    options |= {"temperature": 1.5, "max_new_tokens": STEPS}
    prompts = [random_prompt(40), random_prompt(LONG, seed=1)]
    draws = [model.generate(prompts, seed=seed, **options) for seed in range(3)]

    def bind_as_on_a_device(_, binding, manifest, rows, capacity, candidates):
        return DeviceSteps(binding, manifest, rows, candidates)

    monkeypatch.setattr(CPUProvider, "bind_steps", bind_as_on_a_device)
    monkeypatch.setattr(DeviceSteps, "logits", lambda _: pytest.fail("the logits were copied"))
    for seed, expected in enumerate(draws):
        found = model.generate(prompts, seed=seed, **options)
        assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    assert len({tuple(answer.token_ids) for drawn in draws for answer in drawn}) > 3


def test_more_candidates_than_there_are_are_taken_from_the_logits():
    ids, logits = np.array([[5, 1, 9, 3]]), np.array([[4, 2, 2, 2]], np.float32)
    assert in_order(ids, logits, 2) is None, "equals of the last may be missing"
    (few,) = in_order(ids, logits, 1)
    np.testing.assert_array_equal(few[0], [1, 3, 5, 9])
    np.testing.assert_array_equal(few[1], [2, 2, 4, 2])


def test_its_caches_have_one_length_whatever_the_layer(model):
    assert all(cache.window is None for cache in model.manifest.caches)
    cache = model.engine.new_cache(1, 300)
    assert {layer.capacity for layer in cache.layers} == {300}
    assert {cache.attention_window for cache in model.manifest.caches} == {WINDOW, None}


def test_genai_is_told_to_put_it_on_the_device(model):
    config = json.loads((model.folder / "genai_config.json").read_text())
    (stages,) = config["model"]["decoder"]["pipeline"]
    assert stages["transformer"]["session_options"]["provider_options"] == [{"cuda": {}}]
    assert "provider_options" not in stages["embeddings"]["session_options"]


@pytest.mark.parametrize("precision", ["bf16", "int4"])
@pytest.mark.parametrize("kind", ["shallow", "untied"])
def test_made_fp32_it_equals_transformers(request, exported, tmp_path: Path, precision, kind):
    source = request.getfixturevalue(f"{kind}_checkpoint")
    folder = shutil.copytree(exported(source, precision=precision, target="cuda"), tmp_path / "artifact")
    stored = stored_in(load_manifest(folder))
    widen(folder)
    model = OnnxGemma3n.from_pretrained(folder, "cpu")
    ours = generate_greedily(model, random_prompt(LONG, seed=8), STEPS)
    checkpoint = Checkpoint.open(source)
    decoder = load_decoder(checkpoint, whole(checkpoint.text_config), stored)
    theirs = decoder_logits(decoder, ours.oracle_ids, STEPS)
    assert_close(f"{precision} for CUDA, {kind}, made fp32", ours.logits, theirs, TOLERANCE)
    assert ours.tokens == theirs.argmax(-1).tolist()


def widen(folder: Path) -> None:
    """Has the decoder of an artifact, and its manifest, fp32 wherever they have bf16; activations stay whole, and the
    two factors in the graph are made what they are without rounding."""
    graph = ir.load(folder / "decoder.onnx")
    manifest = json.loads((folder / "manifest.json").read_text())
    factors = (math.sqrt(0.5), manifest["token_embeddings"]["width"] ** -0.5)
    whole_of = {float(torch.tensor(factor, dtype=torch.bfloat16)): factor for factor in factors}
    values = [*graph.graph.inputs, *graph.graph.outputs, *(output for node in graph.graph for output in node.outputs)]
    for value in values:
        if value.dtype in WIDE:
            value.dtype = WIDE[value.dtype]
    for value in graph.graph.initializers.values():
        if value.dtype in WIDE:
            wide = value.const_value.numpy().astype(np.float32)
            if not wide.shape:
                wide = np.array(whole_of[float(wide)], np.float32)
            value.const_value = ir.tensor(wide, name=value.name)
            value.dtype = WIDE[value.dtype]
    for node in graph.graph:
        if node.op_type == "Cast" and (to := ir.DataType(node.attributes["to"].as_int())) in WIDE:
            node.attributes["to"] = ir.AttrInt64("to", WIDE[to])
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
    ir.save(graph, folder / "decoder.onnx")
    del manifest["export_id"]
    manifest["compute_dtype"] = "fp32"
    decoder = manifest["decoder"]
    for tensor in (*decoder["inputs"], *decoder["outputs"], *manifest["caches"]):
        tensor["dtype"] = {"bf16": "fp32"}.get(tensor["dtype"], tensor["dtype"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    record(folder, "decoder.onnx")
