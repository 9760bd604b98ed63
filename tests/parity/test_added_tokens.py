"""Vocabularies that were resized: what transformers reads of them, and what it does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Gemma3nForCausalLM, Gemma3nForConditionalGeneration

from added_tokens import ADDED, FIRST_ADDED, grow, resize_token_table
from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.export.verify.parity import describe, random_prompts, verify
from gemma3n_onnx.export.weights import as_torch
from gemma3n_onnx.graphs.audio import AudioConfig, AudioEncoder
from gemma3n_onnx.runtime import OnnxGemma3n
from multimodal import MultimodalOracle, assert_equals_transformers, clip, image, user
from oracle import (
    LONG,
    TOLERANCE,
    assert_close,
    generate_greedily,
    load_oracle,
    oracle_logits,
    oracle_tokens,
    random_prompt,
)
from support import graph_of, save_as_transformers

STEPS = 24
ADDED_IDS = [FIRST_ADDED + i for i in range(len(ADDED))]
TEXT = f"A <think>{ADDED[2]} on the river</think> is a ship."


def with_added(prompt: list[int]) -> list[int]:
    return [*prompt[:9], *ADDED_IDS, *prompt[9:], *reversed(ADDED_IDS)]


def assert_equals(what: str, model: OnnxGemma3n, oracle: Gemma3nForCausalLM) -> None:
    ours = generate_greedily(model, with_added(random_prompt(LONG, seed=3, vocab_size=FIRST_ADDED)), STEPS)
    theirs = oracle_logits(oracle, ours.oracle_ids, STEPS)
    assert theirs.shape[1] == FIRST_ADDED + len(ADDED)
    assert_close(what, ours.logits, theirs, TOLERANCE)
    assert ours.tokens == oracle_tokens(oracle, ours.prompt, STEPS)


def test_added_tokens_equal_transformers(grown_checkpoint, exported, grown_oracle):
    model = OnnxGemma3n.from_pretrained(exported(grown_checkpoint))
    assert model.manifest.vocab_size == model.manifest.per_layer_embeddings.rows == FIRST_ADDED + len(ADDED)
    assert_equals("both tables resized", model, grown_oracle)


def test_without_rows_in_the_per_layer_table_they_equal_transformers(small_checkpoint, exported, tmp_path: Path):
    model = Gemma3nForCausalLM.from_pretrained(small_checkpoint, dtype=torch.float32)
    folder = grow(model, small_checkpoint, tmp_path / "checkpoint", resize_token_table)
    ours = OnnxGemma3n.from_pretrained(exported(folder))
    assert ours.manifest.per_layer_embeddings.rows == 1024
    assert_equals("token table resized", ours, load_oracle(folder))


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_verify_agrees(grown_checkpoint, exported, precision):
    model = OnnxGemma3n.from_pretrained(exported(grown_checkpoint, precision=precision))
    parity = verify(model, Checkpoint.open(grown_checkpoint), None, None, [with_added(random_prompt(LONG))], STEPS)
    print(describe(parity))
    assert parity.passed


def test_verify_draws_any_id(grown_checkpoint, exported):
    model = OnnxGemma3n.from_pretrained(exported(grown_checkpoint))
    (prompt,) = random_prompts(model, np.random.default_rng(0), 1, 20_000)
    assert set(range(4, FIRST_ADDED + len(ADDED))) == {*prompt[1:]}


def test_text_with_added_tokens_gives_transformers_tokens(grown_checkpoint, exported, grown_oracle):
    model = OnnxGemma3n.from_pretrained(exported(grown_checkpoint))
    ids = AutoTokenizer.from_pretrained(grown_checkpoint)(TEXT)["input_ids"]
    assert {*ADDED_IDS} <= {*ids}
    assert model.tokenizer.encode(TEXT, add_bos=True) == ids
    answer = model.generate(TEXT, max_new_tokens=STEPS)
    assert list(answer.token_ids) == oracle_tokens(grown_oracle, ids, STEPS)[: len(answer.token_ids)]
    assert model.tokenizer.decode(ADDED_IDS, skip_special=False) == "".join(ADDED)


def test_tables_larger_than_the_config_says_are_read_whole(grown_checkpoint, exported, tmp_path: Path):
    """transformers does not read them."""
    folder = shutil.copytree(grown_checkpoint, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    old = config | {"vocab_size": FIRST_ADDED, "vocab_size_per_layer_input": 1024}
    (folder / "config.json").write_text(json.dumps(old))
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        Gemma3nForCausalLM.from_pretrained(folder)
    for path in sorted(exported(grown_checkpoint).iterdir()):
        if path.name != "manifest.json":
            assert (exported(folder) / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.fixture(scope="module")
def full(small_full_checkpoint, tmp_path_factory):
    model = Gemma3nForConditionalGeneration.from_pretrained(small_full_checkpoint, dtype=torch.float32)
    return grow(model, small_full_checkpoint, tmp_path_factory.mktemp("checkpoint") / "full")


@pytest.fixture(scope="module")
def full_model(full, exported):
    return OnnxGemma3n.from_pretrained(exported(full))


@pytest.fixture(scope="module")
def full_oracle(full):
    return MultimodalOracle.load(full)


def test_a_resized_model_with_encoders_equals_transformers(full_model, full_oracle):
    assert_equals_transformers("resized", full_model, full_oracle, [user("Look", image(0), "and tell.")])


def test_every_older_id_of_a_model_with_encoders_equals_transformers(full_model, full_oracle):
    ids = [2, *range(1000, FIRST_ADDED, 7), FIRST_ADDED - 1]
    ours = generate_greedily(full_model, ids, 1)
    assert_close("older ids", ours.logits, full_oracle.logits(ids, {}, 1), TOLERANCE)


def test_transformers_reads_no_added_id_with_encoders_and_the_artifact_reads_its_embedding(
    full, full_model, full_oracle
):
    """It looks for them among the audio ids. Text decoders have no audio ids: `verify` compares with one."""
    with pytest.raises(IndexError):
        full_oracle.logits([2, FIRST_ADDED], {})
    parity = verify(full_model, Checkpoint.open(full), None, None, [with_added(random_prompt(LONG))], STEPS)
    print(describe(parity))
    assert parity.passed
    ids = np.array(ADDED_IDS)
    np.testing.assert_array_equal(full_model.engine._embed(ids), full_model.engine._tokens.rows(ids))


def test_clips_are_padded_as_before_the_resize(full, exported, small_full_checkpoint, small_full_artifact, full_oracle):
    """As in a resized model of transformers before it is saved; loaded again, it fails on any clip."""
    grown, first = exported(full), small_full_artifact
    assert graph_of(grown / "audio_encoder.onnx") == graph_of(first / "audio_encoder.onnx")
    weights = "audio_encoder.onnx.data"
    assert (grown / weights).read_bytes() == (first / weights).read_bytes()
    inputs = full_oracle.inputs([user("Listen", clip(0))])
    with pytest.raises(IndexError):
        full_oracle.logits(inputs.ids, inputs.media)


@pytest.fixture(scope="module")
def shrunk(small_full_checkpoint, tmp_path_factory):
    """1,200 ids: the last ones of the image tokens, and the audio tokens, are gone."""
    model = Gemma3nForConditionalGeneration.from_pretrained(small_full_checkpoint, dtype=torch.float32)
    resize_token_table(model, 1200)
    folder = save_as_transformers(model, small_full_checkpoint, tmp_path_factory.mktemp("checkpoint") / "shrunk")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: i for token, i in vocab.items() if i < 1200}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_a_smaller_vocabulary_equals_transformers_and_pads_clips_with_its_last_id(shrunk, exported):
    ours, oracle = OnnxGemma3n.from_pretrained(exported(shrunk, modalities=("text",))), MultimodalOracle.load(shrunk)
    found = generate_greedily(ours, [2, *range(1000, 1200)], 4)
    assert_close("1,200 ids", found.logits, oracle.logits(found.oracle_ids, {}, 4), TOLERANCE)

    checkpoint = Checkpoint.open(shrunk)
    encoder = AudioEncoder(AudioConfig.from_hf(checkpoint.config))
    names = [name for name, _ in encoder.named_parameters()]
    encoder.load_state_dict(
        {name: as_torch(checkpoint.raw_read(checkpoint.encoder_raw_name(name))) for name in names}, strict=False
    )
    with torch.no_grad():
        padding = encoder(torch.zeros(1, 16, 128), torch.ones(1, 16, dtype=torch.bool))[1:]
        last = oracle.model.model.embed_audio(torch.tensor([[1199]]))[0]
    assert_close("the padding of a clip", padding.numpy(), last.expand_as(padding).numpy(), TOLERANCE)
