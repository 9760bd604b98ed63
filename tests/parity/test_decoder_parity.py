"""The decoder against transformers, and against itself fed in other ways."""

from __future__ import annotations

import numpy as np
import pytest

from gemma3n_onnx.runtime import OnnxGemma3n
from oracle import (
    LONG,
    SAME_GRAPH,
    TOLERANCE,
    WINDOW,
    assert_close,
    generate_greedily,
    oracle_logits,
    oracle_tokens,
    random_prompt,
)


def test_full_depth_equals_transformers_at_every_decode_step(tiny_model, tiny_oracle):
    prompt = random_prompt(LONG, vocab_size=1280)
    ours = generate_greedily(tiny_model, prompt, 64)
    theirs = oracle_logits(tiny_oracle, ours.oracle_ids, 64)
    assert_close("35 layers, 64 steps", ours.logits, theirs, TOLERANCE)
    assert ours.tokens == theirs.argmax(-1).tolist()
    assert ours.tokens == oracle_tokens(tiny_oracle, prompt, 64)
    assert len(set(ours.tokens)) > 16, "a loop of few tokens would prove little"


def test_generate_gives_transformers_tokens(tiny_model, tiny_oracle):
    prompt = random_prompt(LONG, seed=1)
    result = tiny_model.generate(prompt, max_new_tokens=32)
    assert list(result.token_ids) == oracle_tokens(tiny_oracle, prompt, 32)[: len(result.token_ids)]
    assert result.finish_reason == "length"


@pytest.mark.parametrize("length", [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 20, 21, 2 * WINDOW, 5 * WINDOW + 3])
def test_every_prompt_length_around_the_window_equals_transformers(shallow_model, shallow_oracle, length):
    ours = generate_greedily(shallow_model, random_prompt(length, seed=length), 24)
    theirs = oracle_logits(shallow_oracle, ours.oracle_ids, 24)
    assert_close(f"prompt of {length}", ours.logits, theirs, TOLERANCE)


def test_batch_equals_each_prompt_alone(shallow_model):
    prompts = [random_prompt(n, seed=n) for n in (5, WINDOW + 1, LONG)]
    steps, engine = 32, shallow_model.engine
    cache = engine.new_cache(3, LONG + steps)
    logits = [np.stack([engine.prefill(cache, row, ids).copy() for row, ids in enumerate(prompts)])]
    decoder = engine.step_runner(cache)
    while len(logits) < steps:
        logits.append(decoder.step(logits[-1].argmax(-1), np.full(3, True)).copy())
    together = np.stack(logits, axis=1)  # [B, N, V]
    for row, prompt in enumerate(prompts):
        alone = generate_greedily(shallow_model, prompt, steps)
        assert_close(f"row of {len(prompt)}", together[row], alone.logits, SAME_GRAPH)
        assert together[row].argmax(-1).tolist() == alone.tokens


def test_rows_that_stop_early_leave_the_others_as_they_are(shallow_model):
    prompts = [random_prompt(n, seed=n) for n in (5, WINDOW + 1, LONG)]
    alone = [generate_greedily(shallow_model, prompt, 32) for prompt in prompts]
    engine = shallow_model.engine
    cache = engine.new_cache(3, LONG + 32)
    logits = np.stack([engine.prefill(cache, row, ids).copy() for row, ids in enumerate(prompts)])
    decoder = engine.step_runner(cache)
    last_step = [3, 32, 20]
    for step in range(1, 32):
        running = np.array([step < last for last in last_step])
        tokens = np.array([row.tokens[step - 1] for row in alone])
        logits = decoder.step(tokens, running)
        for row in np.flatnonzero(running):
            assert_close(f"step {step}, row {row}", logits[row], alone[row].logits[step], SAME_GRAPH)
    assert cache.lengths.tolist() == [len(p) + last - 1 for p, last in zip(prompts, last_step)]


@pytest.fixture(scope="module")
def all_logits_folder(shallow_checkpoint, exported):
    return exported(shallow_checkpoint, logits="all")


@pytest.mark.parametrize("chunk", [1, 7, WINDOW, 512])
def test_all_logits_equal_transformers_at_every_position(all_logits_folder, shallow_oracle, chunk):
    ids = random_prompt(4 * WINDOW + 3, seed=3, vocab_size=1280)
    model = OnnxGemma3n.from_pretrained(all_logits_folder, prefill_chunk=chunk)
    assert_close(f"chunks of {chunk}", model.engine.evaluate(ids), oracle_logits(shallow_oracle, ids), TOLERANCE)


@pytest.mark.parametrize("length", [1, WINDOW, WINDOW + 1, LONG])
def test_short_prefill_tail_equals_the_full_one(all_logits_folder, shallow_model, length):
    ids = random_prompt(length, seed=4)
    full = OnnxGemma3n.from_pretrained(all_logits_folder).engine.evaluate(ids)[-1]
    short = shallow_model.engine.prefill(shallow_model.engine.new_cache(1, length), 0, ids)
    assert_close(f"prompt of {length}", short, full, SAME_GRAPH)


@pytest.mark.parametrize("chunk", [1, 7, WINDOW, WINDOW + 1, LONG - 1])
def test_prefill_in_chunks_equals_prefill_at_once(shallow_checkpoint, exported, shallow_model, chunk):
    prompt = random_prompt(LONG, seed=5)
    whole = generate_greedily(shallow_model, prompt, 32)
    model = OnnxGemma3n.from_pretrained(exported(shallow_checkpoint), prefill_chunk=chunk)
    chunked = generate_greedily(model, prompt, 32)
    assert_close(f"chunks of {chunk}", chunked.logits, whole.logits, SAME_GRAPH)
    assert chunked.tokens == whole.tokens
