"""Prompts that begin as earlier ones did: what is taken from their KV caches changes no answer."""

from __future__ import annotations

import numpy as np
import pytest

from gemma3n_onnx.runtime import OnnxGemma3n
from gemma3n_onnx.runtime.engine.prefix_cache import PrefixCache, PrefixEntry, _superfluous
from gemma3n_onnx.runtime.errors import OptionError
from multimodal import SIZE, clip, image, user
from oracle import SAME_GRAPH, TOLERANCE, WINDOW, assert_close, oracle_logits, random_prompt

CHUNK = 24
NEW = 12


@pytest.fixture(scope="module")
def folder(shallow_checkpoint, exported):
    return exported(shallow_checkpoint)


def load(folder, prefix_cache_size=1):
    return OnnxGemma3n.from_pretrained(folder, prefill_chunk=CHUNK, prefix_cache_size=prefix_cache_size)


def answer(model, prompt):
    return model.generate(prompt, max_new_tokens=NEW, logprobs=0)


def assert_same(what, ours, theirs):
    """Token ids, and the probabilities of each."""
    assert ours.token_ids == theirs.token_ids
    chances = [np.array([[token.logprob for token in result.logprobs]]) for result in (ours, theirs)]
    assert np.abs(chances[0] - chances[1]).max() < 1e-4
    print(f"{what}: {ours.timings.cached_tokens} of {len(ours.prompt_token_ids)} prompt tokens were kept")


@pytest.mark.parametrize("shared", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 5, 6 * CHUNK + 7, 6 * CHUNK + 20])
def test_another_end_of_the_same_prompt(folder, shallow_oracle, shared):
    first = random_prompt(6 * CHUNK + 20, seed=1)
    second = [*first[:shared], *random_prompt(2 * WINDOW, seed=9)[1:]]
    model, plain = load(folder), load(folder, prefix_cache_size=0)
    answer(model, first)
    ours, theirs = answer(model, second), answer(plain, second)
    assert_same(f"{shared} shared", ours, theirs)
    timings = ours.timings
    assert timings.prefill_tokens == len(second) - timings.cached_tokens
    assert theirs.timings.cached_tokens == 0
    assert (timings.cached_tokens > 0) == (shared >= CHUNK)
    assert timings.cached_tokens % CHUNK == 0 or timings.cached_tokens == len(first)
    ids = [*second, *ours.token_ids[:-1]]
    assert list(ours.token_ids) == oracle_logits(shallow_oracle, ids, len(ours.token_ids)).argmax(-1).tolist()


def test_logits_after_a_kept_beginning_are_those_of_a_whole_prefill(folder, shallow_oracle):
    """Windows have been left behind twice before the shared part ends."""
    engine, cache = load(folder).engine, PrefixCache(1)
    first = random_prompt(7 * CHUNK, seed=3)
    second = [*first[: 5 * CHUNK + 3], *random_prompt(30, seed=4)[1:]]
    for ids in (first, second):
        kv = engine.new_cache(1, len(ids) + 1)
        kept = cache.begin(list(ids), kv)
        tokens = int(kv.lengths[0])
        logits = engine.prefill(kv, 0, ids[tokens:], after_chunk=kept.remember)
        cache.keep(kept)
    assert tokens >= 4 * CHUNK > 2 * WINDOW
    fresh = engine.prefill(engine.new_cache(1, len(second) + 1), 0, second)
    assert_close(f"{tokens} of {len(second)} tokens kept", logits[None], fresh[None], SAME_GRAPH)
    assert_close("against transformers", logits[None], oracle_logits(shallow_oracle, second, 1), TOLERANCE)


def test_a_conversation_sent_anew_each_time_goes_on_where_it_was(folder):
    model, plain = load(folder), load(folder, prefix_cache_size=0)
    ids = random_prompt(3 * CHUNK + 5, seed=5)
    for _ in range(3):
        ours = answer(model, ids)
        assert_same("turn", ours, answer(plain, ids))
        ids = [*ids, *ours.token_ids, *random_prompt(9, seed=len(ids))[1:]]
    assert ours.timings.prefill_tokens == NEW + 8


def test_the_same_prompt_again_runs_its_end_only(folder):
    model = load(folder)
    ids = random_prompt(3 * CHUNK + 5, seed=6)
    first, again = answer(model, ids), answer(model, ids)
    assert_same("again", again, first)
    assert again.timings.prefill_tokens == 5


def test_a_beginning_stays_kept_for_a_third_prompt(folder):
    model = load(folder)
    beginning = random_prompt(4 * CHUNK, seed=7)
    kept = [answer(model, [*beginning, *random_prompt(15, seed=s)[1:]]).timings.cached_tokens for s in range(4)]
    assert kept == [0, 4 * CHUNK, 4 * CHUNK, 4 * CHUNK]


def test_only_so_many_prompts_are_kept_and_release_frees_them(folder):
    model = load(folder, prefix_cache_size=2)
    prompts = [random_prompt(2 * CHUNK, seed=s) for s in range(3)]
    for prompt in prompts:
        answer(model, prompt)
    assert [answer(model, p).timings.cached_tokens for p in (prompts[0], prompts[2])] == [0, CHUNK]
    assert model._prefix_cache.nbytes > 0
    model.release()
    assert model._prefix_cache.nbytes == 0
    assert answer(model, prompts[2]).timings.cached_tokens == 0


def test_batches_and_chats_keep_to_themselves(folder):
    model = load(folder)
    ids = random_prompt(2 * CHUNK, seed=8)
    answer(model, ids)
    assert model.generate([ids, ids[:-1]], max_new_tokens=2)[0].timings.cached_tokens == 0


def test_another_image_is_another_beginning(shallow_multimodal_checkpoint, exported):
    """The ids are the same, and so is an encoder's work saved only where the image is."""
    model = OnnxGemma3n.from_pretrained(exported(shallow_multimodal_checkpoint), prefill_chunk=CHUNK)
    plain = OnnxGemma3n.from_pretrained(exported(shallow_multimodal_checkpoint), prefix_cache_size=0)
    options = {"max_new_tokens": 6, "image_size": SIZE, "logprobs": 0}
    for messages, kept in (
        ([user(image(0), "What is this?")], False),
        ([user(image(1), "What is this?")], False),
        ([user(image(1), "And where?", clip(0))], True),
    ):
        ours = model.generate(messages, **options)
        assert_same("media", ours, plain.generate(messages, **options))
        assert (ours.timings.cached_tokens > 100) == kept


def test_another_question_about_an_image_runs_the_question_only(shallow_multimodal_model):
    model = shallow_multimodal_model
    model.release()
    for question, kept in (("What is this?", False), ("Where was it made?", True)):
        timings = model.generate([user(image(1), question)], max_new_tokens=1, image_size=SIZE).timings
        assert (timings.cached_tokens > 256) == kept
    assert timings.prefill_tokens < 32


@pytest.mark.parametrize("value", [-1, 1.5, True, "2"])
def test_bad_numbers_of_prompts(folder, value):
    with pytest.raises(OptionError, match="prefix_cache_size"):
        OnnxGemma3n.from_pretrained(folder, prefix_cache_size=value)


@pytest.mark.parametrize(
    ("positions", "left"),
    [
        ([10], [10]),
        ([10, 20], [10, 20]),
        ([10, 20, 30, 40], [10, 20, 30, 40]),
        ([8, 16, 24, 32, 40, 48, 56, 64], [8, 16, 32, 48, 56, 64]),
        ([8, 16, 24, 32, 40, 41], [8, 16, 32, 40, 41]),
    ],
)
def test_positions_thin_out_away_from_both_ends(positions, left):
    assert sorted(set(positions) - set(_superfluous(positions))) == left


def test_a_kept_prompt_is_usable_up_to_a_position_it_remembers():
    kept = PrefixEntry([1, 2, 3, 4, 5, 6], cache=None, windows={2: [], 4: [], 6: []})  # type: ignore[arg-type]
    assert [kept.usable(keys) for keys in ([1], [1, 2, 9], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7], [9])] == [
        0,
        2,
        4,
        6,
        0,
    ]
