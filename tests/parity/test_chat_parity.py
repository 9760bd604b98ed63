"""A chat that keeps its cache says what a fresh start on the same tokens says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gemma3n_onnx.runtime import PromptError

NEW_TOKENS = 48
TURNS = (
    "Which river is the longest, and where does it meet the sea?",
    "And the second longest?",
    "Thank you. Name one more.",
)


@pytest.fixture
def model(shallow_model, monkeypatch):
    """Every 16th id ends a turn: random weights would hardly ever choose the two that do."""
    endings = tuple(range(1, shallow_model.manifest.vocab_size, 16))
    manifest = replace(shallow_model.manifest, eos_token_ids=endings)
    monkeypatch.setattr(shallow_model, "manifest", manifest)
    monkeypatch.setattr(shallow_model.engine, "manifest", manifest)
    special_ids = shallow_model.tokenizer.special_ids | set(endings)
    monkeypatch.setattr(shallow_model.tokenizer, "special_ids", special_ids)
    return shallow_model


def assert_equals_a_fresh_start(model, result, new_tokens=NEW_TOKENS):
    fresh = model.generate(list(result.prompt_token_ids), max_new_tokens=new_tokens)
    assert result.token_ids == fresh.token_ids
    assert result.text == fresh.text


def test_turns_equal_a_fresh_start_and_reuse_the_cache(model):
    chat = model.chat("Answer in one word.")
    seen = []  # tokens that the cache holds
    for text in TURNS:
        result = chat.send(text, max_new_tokens=NEW_TOKENS)
        assert result.finish_reason == "stop"
        assert_equals_a_fresh_start(model, result)
        assert list(result.prompt_token_ids[: len(seen)]) == seen
        print(f"{result.timings.prefill_tokens} of {len(result.prompt_token_ids)} prompt tokens run")
        assert result.timings.prefill_tokens == len(result.prompt_token_ids) - len(seen)
        seen = [*result.prompt_token_ids, *result.token_ids[:-1]]
    assert [message["role"] for message in chat.messages] == ["system"] + ["user", "assistant"] * 3
    assert len(seen) > 100, "the windowed caches have dropped positions"


def test_turn_without_an_end_token_goes_on_from_its_text(model):
    chat = model.chat()
    first = chat.send(TURNS[0], max_new_tokens=2)
    assert first.finish_reason == "length"
    assert_equals_a_fresh_start(model, chat.send(TURNS[1], max_new_tokens=NEW_TOKENS))


@pytest.mark.parametrize("pieces", [1, 2, 3, 4])
def test_turn_broken_off_while_streaming_is_forgotten(model, pieces):
    chat = model.chat()
    chat.send(TURNS[0], max_new_tokens=NEW_TOKENS)
    before = list(chat.messages)
    for count, _ in enumerate(chat.stream(TURNS[1], max_new_tokens=NEW_TOKENS), start=1):
        if count == pieces:
            break
    assert chat.messages == before
    after = chat.send(TURNS[2], max_new_tokens=NEW_TOKENS)
    assert_equals_a_fresh_start(model, after)
    undisturbed = model.chat()
    undisturbed.send(TURNS[0], max_new_tokens=NEW_TOKENS)
    assert undisturbed.send(TURNS[2], max_new_tokens=NEW_TOKENS).token_ids == after.token_ids


def test_cache_that_cannot_be_cut_is_filled_again(model):
    reused = set()
    for pieces in range(1, 7):
        chat = model.chat()
        for count, _ in enumerate(chat.stream(TURNS[0], max_new_tokens=NEW_TOKENS), start=1):
            if count == pieces:
                break
        again = chat.send(TURNS[0], max_new_tokens=NEW_TOKENS)
        assert_equals_a_fresh_start(model, again)
        reused.add(again.timings.prefill_tokens < len(again.prompt_token_ids))
    assert reused == {True, False}


def test_edited_conversation_equals_a_fresh_start(model):
    chat = model.chat()
    chat.send(TURNS[0], max_new_tokens=NEW_TOKENS)
    chat.send(TURNS[1], max_new_tokens=NEW_TOKENS)
    chat.messages[1]["content"] = "The Nile."
    assert_equals_a_fresh_start(model, chat.send(TURNS[2], max_new_tokens=NEW_TOKENS))
    del chat.messages[2:]
    assert_equals_a_fresh_start(model, chat.send(TURNS[2], max_new_tokens=NEW_TOKENS))


def test_turn_left_open_does_not_disturb_later_turns(model):
    chat = model.chat()
    left_open = iter(chat.stream("a", max_new_tokens=NEW_TOKENS))
    next(left_open)
    # As short as its prompt, so that the windowed caches could be cut.
    assert_equals_a_fresh_start(model, chat.send("b", max_new_tokens=1), 1)
    left_open.close()
    chat.messages.clear()
    assert_equals_a_fresh_start(model, chat.send("a", max_new_tokens=NEW_TOKENS))


def test_turn_left_open_cannot_go_on_after_the_next(model):
    chat = model.chat()
    left_open = iter(chat.stream(TURNS[0]))
    next(left_open)
    never_begun = iter(chat.stream(TURNS[1]))
    chat.send(TURNS[2], max_new_tokens=NEW_TOKENS)
    for turn in (left_open, never_begun):
        with pytest.raises(PromptError, match="has ended"):
            next(turn)
    assert_equals_a_fresh_start(model, chat.send(TURNS[1], max_new_tokens=NEW_TOKENS))


def test_system_prompt_and_reset(model):
    chat = model.chat("Answer in one word.")
    first = chat.send(TURNS[0], max_new_tokens=NEW_TOKENS)
    chat.send(TURNS[1], max_new_tokens=NEW_TOKENS)
    chat.reset()
    again = chat.send(TURNS[0], max_new_tokens=NEW_TOKENS)
    assert (again.prompt_token_ids, again.token_ids) == (first.prompt_token_ids, first.token_ids)
