"""onnxruntime-genai 0.18 runs an exported folder as it is, and chooses the tokens that `OnnxGemma3n` chooses.

One limit is the library's: it takes one image a prompt ("multi-image vision requires pixel_position_ids").
"""

from __future__ import annotations

import numpy as np
import pytest

from gemma3n_onnx.runtime import OnnxGemma3n
from gemma3n_onnx.runtime.prompt.messages import items_of
from genai_loop import by_inputs, by_tokens, greedily, og
from multimodal import OPTIONS, SIZE, clip, image, user
from oracle import SAME_GRAPH, WINDOW, assert_close, generate_greedily

NEW_TOKENS = 32
LONG_TEXT = "Name the longest river, and the sea that it ends in. " * 4


@pytest.fixture(scope="module")
def full(shallow_multimodal_model, shallow_multimodal_checkpoint, exported):
    return shallow_multimodal_model, og.Model(str(exported(shallow_multimodal_checkpoint)))


@pytest.fixture(scope="module")
def text_only(shallow_multimodal_checkpoint, exported):
    folder = exported(shallow_multimodal_checkpoint, modalities=("text",))
    return OnnxGemma3n.from_pretrained(folder), og.Model(str(folder))


def assert_same_answer(model, messages, theirs):
    tokens, logits = theirs
    prompt = model.encode(messages, OPTIONS)
    ours = generate_greedily(model, prompt.ids, len(tokens), prompt.spans)
    assert_close(f"{len(prompt)} prompt tokens, {len(tokens)} new", logits, ours.logits, SAME_GRAPH)
    assert len(prompt) > 2 * WINDOW and len(tokens) >= 24
    assert tokens == ours.tokens == list(model.generate(messages, max_new_tokens=NEW_TOKENS, image_size=SIZE).token_ids)


MESSAGES = {
    "text": [user(LONG_TEXT)],
    "image": [user(image(0), LONG_TEXT)],
    "clip": [user(clip(0), LONG_TEXT)],
    "image and clip": [user("Look", image(1), "and listen", clip(1), LONG_TEXT)],
}


@pytest.mark.parametrize("messages", MESSAGES.values(), ids=MESSAGES)
def test_media_through_set_inputs(full, messages):
    model, theirs = full
    prompt, items = model.encode(messages, OPTIONS), items_of(model.read(messages, OPTIONS))
    assert_same_answer(model, messages, greedily(theirs, prompt, by_inputs(prompt, items), NEW_TOKENS))


@pytest.mark.parametrize("artifact", ["full", "text_only"])
def test_text_through_append_tokens(request, artifact):
    model, theirs = request.getfixturevalue(artifact)
    prompt = model.encode(MESSAGES["text"])
    answer = greedily(theirs, prompt, by_tokens(prompt), NEW_TOKENS)
    assert_same_answer(model, MESSAGES["text"], answer)


def test_an_output_head_of_its_own(untied_checkpoint, exported):
    folder = exported(untied_checkpoint)
    model = OnnxGemma3n.from_pretrained(folder)
    prompt = model.encode(MESSAGES["text"])
    answer = greedily(og.Model(str(folder)), prompt, by_tokens(prompt), NEW_TOKENS)
    assert_same_answer(model, MESSAGES["text"], answer)


def test_an_artifact_without_vision_is_a_pipeline(text_only):
    assert text_only[1].type == "decoder-pipeline"


def test_the_library_still_takes_one_image_a_prompt(full):
    """When this fails, the limit is gone, and what is written of it can go too."""
    model, theirs = full
    messages = [user(image(0), image(1), LONG_TEXT)]
    prompt, items = model.encode(messages, OPTIONS), items_of(model.read(messages, OPTIONS))
    named = og.NamedTensors()
    named["input_ids"] = np.array([prompt.ids], np.int32)
    named["pixel_values"] = np.concatenate([item.inputs()["pixel_values"] for item in items])
    named["num_image_tokens"] = np.array([256, 256], np.int64)
    with pytest.raises(Exception, match="multi-image"):
        greedily(theirs, prompt, lambda generator: generator.set_inputs(named), NEW_TOKENS)


@pytest.mark.parametrize(
    "text",
    [
        "Hello world",
        "<bos><start_of_turn>user\nHello\n\n\n<end_of_turn>\n<start_of_turn>model\n",
        "two  spaces,\ttabs\n\n\nand lines ",
        " naïve café, 東京, Москва, 🙂",
        "\n\n<start_of_image><image_soft_token><image_soft_token><end_of_image>\n\n",
        "1234567890 + 0.5e-7 != x_y[3];",
    ],
)
def test_the_librarys_tokenizer_encodes_as_ours(full, text):
    model, theirs = full
    assert list(og.Tokenizer(theirs).encode(text)) == model.tokenizer.encode(text, add_bos=False)
