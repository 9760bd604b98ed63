"""What the storage precisions cost, and the embedding graph against the runtime's own tables."""

from __future__ import annotations

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
import torch

from gemma3n_onnx.export import operator_placement as placement
from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.export.trace import DTYPES
from gemma3n_onnx.export.verify.encoders import describe as describe_encoder
from gemma3n_onnx.export.verify.encoders import verify_encoder
from gemma3n_onnx.export.verify.exact import exact_provider
from gemma3n_onnx.export.verify.parity import describe, verify
from gemma3n_onnx.runtime import OnnxGemma3n, ProviderError
from gemma3n_onnx.runtime.artifact import load_manifest
from gemma3n_onnx.runtime.engine.encoders import Encoders
from gemma3n_onnx.runtime.engine.ort import Session
from gemma3n_onnx.runtime.engine.providers.cpu import CPUProvider
from gemma3n_onnx.runtime.engine.tables import EmbeddingTable
from oracle import (
    LONG,
    TOLERANCE,
    assert_close,
    generate_greedily,
    kl_divergence,
    load_oracle,
    oracle_logits,
    random_prompt,
    relative_error,
)
from support import graph_of

STEPS = 48


def compare(what, ours, theirs):
    """(error, largest KL in nats, greedy agreement), printed."""
    error, kl = relative_error(ours, theirs), kl_divergence(theirs, ours)
    agreement = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    print(f"{what}: error {error:.2e} of the range, KL mean {kl.mean():.2e} max {kl.max():.2e}, greedy {agreement:.1%}")
    return error, float(kl.max()), agreement


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_narrow_storage_equals_transformers_on_rounded_weights(tiny_checkpoint, exported, tiny_oracle, precision):
    model = OnnxGemma3n.from_pretrained(exported(tiny_checkpoint, precision=precision))
    ours = generate_greedily(model, random_prompt(LONG, seed=8), STEPS)
    theirs = oracle_logits(tiny_oracle, ours.oracle_ids, STEPS)
    compare(f"{precision} storage against fp32 weights", ours.logits, theirs)
    rounded = load_oracle(tiny_checkpoint)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(DTYPES[precision]))
    theirs = oracle_logits(rounded, ours.oracle_ids, STEPS)
    assert_close(f"{precision} storage against rounded weights", ours.logits, theirs, TOLERANCE)
    assert ours.tokens == theirs.argmax(-1).tolist()


@pytest.mark.parametrize("precision", ["int8", "mixed", "int4"])
def test_quantized_equals_transformers_on_dequantized_weights(shallow_checkpoint, exported, shallow_oracle, precision):
    """To the bound of fp32 where activations are not rounded, and as near as rounding lets transformers be itself."""
    model = OnnxGemma3n.from_pretrained(exported(shallow_checkpoint, precision=precision))
    checkpoint = Checkpoint.open(shallow_checkpoint)
    parity = verify(model, checkpoint, None, None, [random_prompt(LONG, seed=8), random_prompt(LONG, seed=9)], STEPS)
    print(describe(parity))
    assert parity.passed and parity.tolerance == TOLERANCE
    for compared in (parity.graph, parity.prefill):
        assert compared.rounded.exact.greedy_agreement == 1
        assert compared.rounded.cost.relative_error > 10 * TOLERANCE, "nothing was computed in int8"


def test_fp16_arithmetic_stays_within_its_bound(shallow_checkpoint, exported, shallow_oracle):
    """The graph for CUDA, on the CPU.

    A significand of 11 bits rounds by at most 2^-11 = 4.9e-4, on average by half of that.

    About ten roundings lie on the residual's way through each of ten layers; independent, they add up to
    2.4e-4 * sqrt(100) = 2.4e-3 of a logit's standard deviation, which is a sixth of the range or so: 4e-4 of
    the range. With a standard deviation of 5 that is 0.012 nats, and half their variance as KL: 7e-5. The
    bounds leave a factor of ten for the largest of many positions.
    """
    model = OnnxGemma3n.from_pretrained(exported(shallow_checkpoint, precision="fp16", target="cuda"), "cpu")
    ours = generate_greedily(model, random_prompt(LONG, seed=8), STEPS)
    theirs = oracle_logits(shallow_oracle, ours.oracle_ids, STEPS)
    error, kl, agreement = compare("fp16", ours.logits, theirs)
    assert error <= 4e-3
    assert kl <= 7e-4
    assert agreement >= 0.95


MODALITIES = pytest.mark.parametrize(
    ("modality", "sizes"),
    [("vision", (256, 512)), ("audio", ()), pytest.param("vision", (768,), marks=pytest.mark.full_size)],
    ids=["vision", "audio", "vision-768"],
)


def with_sizes(manifest, sizes):
    """Of images only; 768 px take most of the time."""
    if not sizes:
        return manifest
    vision = dataclasses.replace(manifest.vision, image_sizes=sizes, default_image_size=sizes[0])
    return dataclasses.replace(manifest, vision=vision)


@MODALITIES
def test_int8_encoders_equal_transformers_on_dequantized_weights(
    shallow_multimodal_checkpoint, exported, modality, sizes
):
    loaded = OnnxGemma3n.from_pretrained(exported(shallow_multimodal_checkpoint, precision="int8"))
    checkpoint = Checkpoint.open(shallow_multimodal_checkpoint)
    model = SimpleNamespace(
        folder=loaded.folder,
        manifest=with_sizes(loaded.manifest, sizes),
        encoders=loaded.encoders,
        engine=loaded.engine,
    )
    parity = verify_encoder(model, checkpoint, modality, np.random.default_rng(0))
    print(describe_encoder(parity))
    assert parity.passed
    assert min(parity.cost.values()) > 10 * TOLERANCE, "nothing was computed in int8"
    apart = dict.fromkeys(parity.errors, 1.0)
    assert not dataclasses.replace(parity, exact=apart).passed
    assert not dataclasses.replace(parity, errors=apart).passed


def test_encoders_for_cuda_are_the_same_beside_any_decoder(shallow_multimodal_checkpoint, exported):
    folders = [exported(shallow_multimodal_checkpoint, precision=each, target="cuda") for each in ("fp16", "bf16")]
    for name in ("vision_encoder.onnx", "audio_encoder.onnx"):
        fp16, bf16 = (graph_of(folder / name) for folder in folders)
        assert fp16 == bf16
        fp16, bf16 = ((folder / f"{name}.data").read_bytes() for folder in folders)
        assert fp16 == bf16


@MODALITIES
def test_encoders_for_cuda_equal_transformers(shallow_multimodal_checkpoint, exported, modality, sizes):
    """Their products, in bf16 for CUDA, made fp32, which the CPU has; the CPU refuses them as they are."""
    folder = exported(shallow_multimodal_checkpoint, precision="bf16", target="cuda")
    manifest = with_sizes(load_manifest(folder), sizes)
    checkpoint = Checkpoint.open(shallow_multimodal_checkpoint)
    profile = exact_provider(CPUProvider())
    encoders = Encoders(folder, manifest, profile)
    decoderless = SimpleNamespace(
        folder=folder, manifest=manifest, encoders=encoders, engine=SimpleNamespace(provider=profile)
    )
    parity = verify_encoder(decoderless, checkpoint, modality, np.random.default_rng(0))
    print(describe_encoder(parity))
    assert parity.rounded == "bf16"
    assert parity.passed and max(parity.errors.values()) <= TOLERANCE
    assert min(parity.cost.values()) > 10 * TOLERANCE, "nothing was computed in bf16"
    model = ir.load(folder / manifest.encoders[modality].graph.file)
    assert placement.complaints(model) == []
    graph = model.graph
    products = [node for node in graph if node.op_type == "Gemm"]
    assert len(products) > 20
    assert {value.dtype for node in products for value in (node.inputs[1], node.outputs[0])} == {ir.DataType.BFLOAT16}
    with pytest.raises(ProviderError, match=f"The {modality} encoder computes in bf16, which CPUExecutionProvider"):
        Encoders(folder, manifest, CPUProvider()).features(modality, {})


@pytest.mark.parametrize("precision", ["int8", "mixed", "int4"])
def test_embedding_graph_of_quantized_tables_rounds_their_rows_to_fp16(shallow_checkpoint, exported, precision):
    folder = exported(shallow_checkpoint, precision=precision)
    manifest = OnnxGemma3n.from_pretrained(folder).manifest
    ids = np.array([[0, 1, 2, 5, manifest.per_layer_embeddings.rows - 1]])
    graph = Session(folder / manifest.embedding.file, CPUProvider()).run({"input_ids": ids})
    for name, info in {
        "inputs_embeds": manifest.token_embeddings,
        "per_layer_inputs": manifest.per_layer_embeddings,
    }.items():
        ours = EmbeddingTable(folder, info, manifest.compute_dtype).rows(ids.reshape(-1)).reshape(*ids.shape, -1)
        np.testing.assert_allclose(graph[name], ours, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize(("precision", "target"), [("fp32", "cpu"), ("fp16", "cpu"), ("bf16", "cpu"), ("fp16", "cuda")])
def test_embedding_graph_agrees_with_the_runtime_tables_bit_for_bit(shallow_checkpoint, exported, precision, target):
    folder = exported(shallow_checkpoint, precision=precision, target=target)
    manifest = OnnxGemma3n.from_pretrained(folder, "cpu").manifest
    last_row, last = manifest.per_layer_embeddings.rows - 1, manifest.vocab_size - 1
    ids = np.array([[0, 1, 2, 5, last_row - 1, last_row], [last_row + 1, last_row + 2, last - 1, last, 7, 7]])
    graph = Session(folder / manifest.embedding.file, CPUProvider()).run({"input_ids": ids})
    tables = {
        "inputs_embeds": (manifest.token_embeddings, ids),
        "per_layer_inputs": (manifest.per_layer_embeddings, np.where(ids <= last_row, ids, 0)),
    }
    for name, (info, rows) in tables.items():
        ours = EmbeddingTable(folder, info, manifest.compute_dtype).rows(rows.reshape(-1)).reshape(*ids.shape, -1)
        assert graph[name].dtype == ours.dtype
        np.testing.assert_array_equal(graph[name].view(np.uint8), ours.view(np.uint8), name)


def test_embeddings_equal_transformers(shallow_checkpoint, exported, shallow_oracle):
    folder = exported(shallow_checkpoint)
    ids = np.array([[2, 5, 1023, 1024, 1279]])
    graph = Session(folder / "embedding.onnx", CPUProvider()).run({"input_ids": ids})
    with torch.no_grad():
        embeds = shallow_oracle.model.embed_tokens(torch.from_numpy(ids)).numpy()
        per_layer = shallow_oracle.model.get_per_layer_inputs(torch.from_numpy(ids)).flatten(2).numpy()
    np.testing.assert_array_equal(graph["inputs_embeds"], embeds)
    np.testing.assert_array_equal(graph["per_layer_inputs"], per_layer)


def test_verify_computes_in_fp32_whatever_dtype_the_config_of_an_encoder_names(
    small_full_checkpoint, small_full_artifact, tmp_path
):
    """transformers 5 writes the dtype of the model into each section."""
    folder = shutil.copytree(small_full_checkpoint, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    config["audio_config"]["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    model = OnnxGemma3n.from_pretrained(small_full_artifact)
    parity = verify_encoder(model, Checkpoint.open(folder), "audio", np.random.default_rng(0))
    print(describe_encoder(parity))
    assert parity.passed
