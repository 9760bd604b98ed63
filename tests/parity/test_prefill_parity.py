"""The prefill graph: the caches it fills are those that the decoder would, and whether it reads a prompt is decided by
its length and the memory that may be taken."""

from __future__ import annotations

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.export.manifest import graph_info
from gemma3n_onnx.export.quantization.options import QuantizationOptions
from gemma3n_onnx.export.quantization.recipes import precision_for
from gemma3n_onnx.export.slicing import whole
from gemma3n_onnx.export.text_weights import lay_out_prefill, lay_out_text
from gemma3n_onnx.export.verify.parity import describe, verify
from gemma3n_onnx.export.verify.reference import load_decoder, prefilled_logits, stored_for_prefill, stored_in
from gemma3n_onnx.graphs.passes.cache_only_decoder import CacheOnlyDecoder
from gemma3n_onnx.runtime import OnnxGemma3n, OptionError
from gemma3n_onnx.runtime.artifact import load_manifest
from gemma3n_onnx.runtime.engine import prefill_graph as prefill
from gemma3n_onnx.runtime.engine.engine import Engine
from gemma3n_onnx.runtime.engine.providers.cpu import CPUProvider
from oracle import LONG, TOLERANCE, assert_close, generate_greedily, oracle_logits, random_prompt, relative_error

STEPS = 24
LONGER = prefill.WORTH_LOADING + LONG


@pytest.mark.parametrize("chunk", [7, 64, 512])
def test_without_rounding_its_caches_are_the_decoders(shallow_checkpoint, exported, shallow_oracle, tmp_path, chunk):
    folder = shutil.copytree(exported(shallow_checkpoint), tmp_path / "artifact")
    graph = ir.load(folder / "decoder.onnx")
    CacheOnlyDecoder()(graph)
    ir.save(graph, folder / "prefill.onnx")
    manifest = dataclasses.replace(load_manifest(folder), prefill=graph_info("prefill.onnx", graph))
    engine = Engine(folder, manifest, CPUProvider(), prefill_chunk=chunk)
    engine.prefill_graph.load()
    (folder / "decoder.onnx").unlink()
    ours = generate_greedily(SimpleNamespace(engine=engine), random_prompt(LONGER, seed=3), STEPS)
    theirs = oracle_logits(shallow_oracle, ours.oracle_ids, STEPS)
    assert_close(f"{LONGER} tokens in chunks of {chunk}", ours.logits, theirs, TOLERANCE)
    assert ours.tokens == theirs.argmax(-1).tolist()


@pytest.mark.parametrize("precision", ["mixed", "int4"])
def test_its_weights_are_its_own(shallow_checkpoint, exported, precision):
    """Transformers whose prompt is read with the prefill graph's weights is nearer than with the decoder's."""
    model = OnnxGemma3n.from_pretrained(exported(shallow_checkpoint, precision=precision))
    model.engine.prefill_graph.load()
    ours = generate_greedily(model, random_prompt(LONGER, seed=4), STEPS)
    checkpoint = Checkpoint.open(shallow_checkpoint)

    def load(storage_of):
        return load_decoder(checkpoint, whole(checkpoint.text_config), storage_of)

    of_prefill, of_decoder = stored_for_prefill(model.manifest), stored_in(model.manifest)
    (theirs,) = prefilled_logits(load, (of_prefill, of_decoder), [ours.oracle_ids], STEPS)
    (exchanged,) = prefilled_logits(load, (of_decoder, of_decoder), [ours.oracle_ids], STEPS)
    near, far = relative_error(ours.logits, theirs), relative_error(ours.logits, exchanged)
    print(f"{precision}: {near:.1e} of the range from its own weights, {far:.1e} from the decoder's")
    assert near < far


def test_verify_judges_it_too(shallow_checkpoint, exported):
    model = OnnxGemma3n.from_pretrained(exported(shallow_checkpoint, precision="int4"))
    parity = verify(model, Checkpoint.open(shallow_checkpoint), None, None, [random_prompt(LONG)], 4)
    assert parity.passed and "the prompt on those of its own graph" in describe(parity)
    for error in (1e3, float("nan")):
        for part in ("graph", "prefill"):
            compared = getattr(parity, part)
            wrong = dataclasses.replace(compared.errors, max_error=error)
            inexact = dataclasses.replace(compared.rounded, exact=wrong)
            for apart in (
                dataclasses.replace(compared, errors=wrong),
                dataclasses.replace(compared, rounded=inexact),
            ):
                assert not dataclasses.replace(parity, **{part: apart}).passed


@pytest.fixture(scope="module")
def folder(small_checkpoint, exported):
    return exported(small_checkpoint, precision="int4")


def reads(model: OnnxGemma3n, tokens: int) -> bool:
    """Whether the prefill graph is there after a prompt of so many tokens."""
    model.engine.prefill(model.engine.new_cache(1, tokens), 0, random_prompt(tokens))
    return model.engine.prefill_graph.session(tokens) is not None


def test_it_is_loaded_for_a_prompt_that_is_long_enough(folder):
    model = OnnxGemma3n.from_pretrained(folder)
    assert not reads(model, prefill.WORTH_LOADING - 1)
    assert reads(model, prefill.WORTH_LOADING)
    assert reads(model, prefill.WORTH_RUNNING)
    assert not reads(model, prefill.WORTH_RUNNING - 1)
    model.release("vision")
    assert reads(model, prefill.WORTH_RUNNING)
    model.release()
    assert not reads(model, prefill.WORTH_LOADING - 1)


def test_it_is_loaded_within_the_budget(folder):
    manifest = load_manifest(folder)
    enough = manifest.step_bytes + manifest.files["prefill.onnx.data"].bytes
    assert reads(OnnxGemma3n.from_pretrained(folder, memory_budget=enough), 128)
    assert not reads(OnnxGemma3n.from_pretrained(folder, memory_budget=enough - 1), 128)


@pytest.mark.parametrize(("available", "loaded"), [(0, False), (10**12, True), (None, True)])
def test_by_default_it_is_loaded_where_memory_is_free(folder, monkeypatch, available, loaded):
    monkeypatch.setattr(prefill, "available_memory_bytes", lambda: available)
    assert reads(OnnxGemma3n.from_pretrained(folder), 128) is loaded


@pytest.mark.parametrize("budget", ["1", 1.5, True])
def test_a_budget_is_a_number_of_bytes(folder, budget):
    with pytest.raises(OptionError, match="memory_budget must be"):
        OnnxGemma3n.from_pretrained(folder, memory_budget=budget)


def test_an_artifact_whose_prompts_share_the_decoder(small_checkpoint, exported):
    shared = exported(small_checkpoint, precision="int4", quantization=QuantizationOptions(prefill="shared"))
    assert not [path for path in shared.iterdir() if "prefill" in path.name]
    assert not reads(OnnxGemma3n.from_pretrained(shared), 128)


def test_other_precisions_have_none(small_artifact):
    model = OnnxGemma3n.from_pretrained(small_artifact)
    assert model.manifest.prefill is None
    assert not reads(model, 128)


def test_logits_are_those_of_the_last_token(folder):
    model = OnnxGemma3n.from_pretrained(folder, memory_budget=0)
    prompt = random_prompt(120)
    slow = model.engine.prefill(model.engine.new_cache(1, 120), 0, prompt).copy()
    model.engine.prefill_graph.load()
    told: list[int] = []
    fast = model.engine.prefill(model.engine.new_cache(1, 120), 0, prompt, after_chunk=told.append)
    assert told == [119, 120]
    error = relative_error(fast[None], slow[None])
    print(f"int8 and int4 prefill differ by {error:.1e} of the range")
    assert 1e-6 < error < 0.3
    assert np.isfinite(fast).all()


def test_it_holds_what_it_reads(folder, small_checkpoint):
    """Every product is in int8 with weights of its own, and none of these goes unread."""
    graph = ir.load(folder / "prefill.onnx").graph
    assert {node.op_type for node in graph} >= {"DynamicQuantizeMatMul", "GroupQueryAttention"}
    assert "MatMulNBits" not in {node.op_type for node in graph}
    config = Checkpoint.open(small_checkpoint).text_config
    recipe = precision_for("int4", "cpu")
    places = lay_out_prefill(config, recipe, lay_out_text(config, recipe, None))
    read = {name.removesuffix(".codes") for name in graph.initializers if name.endswith(".codes")}
    assert read == set(places)
    assert max(place.end for place in places.values()) == (folder / "prefill.onnx.data").stat().st_size
