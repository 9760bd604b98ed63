"""A chat about images and clips keeps its cache, runs no encoder twice, and says what a fresh start says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gemma3n_onnx.runtime.generation.options import GenerationOptions
from gemma3n_onnx.runtime.generation.scheduler import Scheduler
from gemma3n_onnx.runtime.generation.stream import GenerationStream
from gemma3n_onnx.runtime.tokens import PromptTokens
from multimodal import SIZE, clip, image, text
from oracle import SAME_GRAPH, TOLERANCE, assert_close, generate_greedily, relative_error

NEW_TOKENS = 24
OPTIONS = {"max_new_tokens": NEW_TOKENS, "image_size": SIZE}


@pytest.fixture
def model(shallow_multimodal_model, monkeypatch):
    """Every 16th id ends a turn, none of them of media: random weights would hardly ever choose the two that do."""
    model = shallow_multimodal_model
    endings = tuple(range(3, model.manifest.vocab_size, 16))
    manifest = replace(model.manifest, eos_token_ids=endings)
    monkeypatch.setattr(model, "manifest", manifest)
    monkeypatch.setattr(model.engine, "manifest", manifest)
    monkeypatch.setattr(model.tokenizer, "special_ids", model.tokenizer.special_ids | set(endings))
    return model


@pytest.fixture
def encoded(model, monkeypatch):
    """The modalities of the encoders' runs, one after another."""
    runs, features = [], model.encoders.features

    def counted(modality, inputs):
        runs.append(modality)
        return features(modality, inputs)

    monkeypatch.setattr(model.encoders, "features", counted)
    return runs


def send(chat, *content):
    """The result of a turn and its whole prompt."""
    turn = chat.stream([text(part) if isinstance(part, str) else part for part in content], **OPTIONS)
    for _ in turn:
        pass
    return turn.result, turn.prompt


def assert_equals_a_fresh_start(model, result, prompt):
    rows = Scheduler(model.engine, model.tokenizer, rows=1, capacity=len(prompt) + NEW_TOKENS)
    fresh = GenerationStream(rows, [prompt], GenerationOptions(max_new_tokens=NEW_TOKENS))
    for _ in fresh:
        pass
    assert result.token_ids == fresh.result.token_ids
    assert result.text == fresh.result.text
    assert list(result.prompt_token_ids) == prompt.ids


def test_later_turns_run_neither_the_encoders_nor_the_decoder_over_what_was_seen(model, encoded):
    chat = model.chat("Answer in one word.")
    first, prompt = send(chat, "What is this?", image(0), clip(0))
    assert first.finish_reason == "stop"
    assert sorted(encoded) == ["audio", "vision"]
    checks = [(first, prompt)]
    for content, wanted in ((["And then?"], []), ([image(1), "And this?"], ["vision"]), (["Thank you."], [])):
        seen = len(prompt) + len(first.token_ids) - 1
        encoded.clear()
        first, prompt = send(chat, *content)
        print(f"{first.timings.prefill_tokens} of {len(prompt)} prompt tokens run, encoders: {encoded}")
        assert first.timings.prefill_tokens == len(prompt) - seen
        assert encoded == wanted
        checks.append((first, prompt))
    for result, whole in checks:
        assert_equals_a_fresh_start(model, result, whole)


def test_last_turn_of_a_chat_equals_transformers(model, shallow_multimodal_oracle):
    chat = model.chat()
    send(chat, image(0), "What is this?")
    result, prompt = send(chat, clip(0), "And this?")
    media = shallow_multimodal_oracle.inputs([{"role": "user", "content": [image(0), clip(0)]}]).media
    ours = generate_greedily(model, prompt.ids, len(result.token_ids), prompt.spans)
    theirs = shallow_multimodal_oracle.logits(ours.oracle_ids, media, len(result.token_ids))
    assert_close("second turn", ours.logits, theirs, TOLERANCE)
    assert list(result.token_ids) == ours.tokens == theirs.argmax(-1).tolist()


@pytest.mark.parametrize(("before", "after"), [(image(0), image(1)), (clip(0), clip(1))], ids=["image", "clip"])
def test_another_image_or_clip_in_the_same_place_is_not_taken_from_the_cache(model, encoded, before, after):
    chat = model.chat()
    _, first = send(chat, "What is this?", before)
    encoded.clear()
    chat.messages[0] = {"role": "user", "content": [text("What is this?"), after]}
    result, prompt = send(chat, "And now?")
    assert len(encoded) == 1, "the edited turn is encoded, and nothing else"
    assert result.timings.prefill_tokens > 188
    assert_equals_a_fresh_start(model, result, prompt)
    # The ids do not tell the two apart, so compare with what the first image or clip would have led to.
    other = PromptTokens(prompt.ids, first.spans)
    assert [span.start for span in first.spans] == [span.start for span in prompt.spans]
    logits = [generate_greedily(model, p.ids, 1, p.spans).logits for p in (prompt, other)]
    difference = relative_error(*logits)
    print(f"the two differ by {difference:.1e} of the range")
    assert difference > 100 * SAME_GRAPH
