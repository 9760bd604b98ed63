"""Prompts with images, clips and videos, from messages to tokens, against transformers' whole model."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.export.trace import DTYPES
from gemma3n_onnx.export.verify.exact import exact_provider
from gemma3n_onnx.export.verify.parity import describe, verify
from gemma3n_onnx.runtime import MediaOptions, OnnxGemma3n
from gemma3n_onnx.runtime.engine.encoders import Encoders
from gemma3n_onnx.runtime.engine.ort import Session
from gemma3n_onnx.runtime.engine.providers.cpu import CPUProvider
from gemma3n_onnx.runtime.media.audio import fit
from media import RATE_HZ, encoded, gradient, sound, speech, video
from multimodal import (
    OPTIONS,
    SENTENCES,
    SIZE,
    MultimodalOracle,
    assert_equals_transformers,
    assert_same_choices,
    assistant,
    clip,
    image,
    round_weights,
    text,
    user,
)
from oracle import SAME_GRAPH, TOLERANCE, WINDOW, assert_close, generate_greedily, random_prompt

TEXT_FIRST = user("Look at this", image(0), image(1), "and hear", clip(0), "what is it?")
IMAGE_AND_CLIP = [user(image(0), clip(0), "What is said here?")]


@pytest.fixture
def model(shallow_multimodal_model):
    return shallow_multimodal_model


@pytest.fixture
def oracle(shallow_multimodal_oracle):
    return shallow_multimodal_oracle


def test_full_depth_with_images_and_speech_equals_transformers(multimodal_checkpoint, exported):
    model, oracle = (
        OnnxGemma3n.from_pretrained(exported(multimodal_checkpoint)),
        MultimodalOracle.load(multimodal_checkpoint),
    )
    ours = assert_equals_transformers("35 layers, two images and a clip", model, oracle, [TEXT_FIRST], steps=32)
    assert len(ours.prompt) > 40 * WINDOW
    assert ours.tokens == oracle.tokens(oracle.inputs([TEXT_FIRST]), 32)
    generated = model.generate([TEXT_FIRST], max_new_tokens=32, image_size=SIZE)
    assert list(generated.token_ids) == ours.tokens[: len(generated.token_ids)]
    assert len(set(ours.tokens)) > 8, "a loop of few tokens would prove little"


def test_verify_reads_every_id_of_the_vocabulary(model, shallow_multimodal_checkpoint):
    """Those above the per-layer table too, which read its row 0; a continuation may hold them."""
    checkpoint = Checkpoint.open(shallow_multimodal_checkpoint)
    rows, count = model.manifest.per_layer_embeddings.rows, model.manifest.vocab_size
    assert rows < count
    prompt = [*random_prompt(WINDOW), *range(rows, count, (count - rows) // 20), count - 1]
    parity = verify(model, checkpoint, None, None, [prompt], 4)
    print(describe(parity))
    assert parity.passed and parity.graph.errors.greedy_agreement == 1


@pytest.mark.parametrize("size", [512, pytest.param(768, marks=pytest.mark.full_size)])
def test_larger_images_equal_transformers(model, oracle, size):
    assert_equals_transformers(f"{size} pixels", model, oracle, [user(image(0), "What is this?")], 8, size)


def test_images_take_the_checkpoints_size_unless_told(model):
    default, told = (model.encode([user(image(0))], MediaOptions(image_size=size)) for size in (None, 768))
    assert default.spans[0].key == told.spans[0].key != model.encode([user(image(0))], OPTIONS).spans[0].key


MESSAGES = {
    "image first": [user(image(0), "What is this?")],
    "image last": [user("What is this?", image(0))],
    "image alone": [user(image(0))],
    "clip first": [user(clip(0), "What was said?")],
    "clip last": [user("Listen:", clip(1))],
    "clip alone": [user(clip(1))],
    "clip before image": [user(clip(0), image(0))],
    "between text": [user("First", image(0), "second", clip(0), "third", image(1), "What comes next?")],
    "three images": [user(image(0), image(1), image(2), "Which is the third?")],
    "the same image twice": [user(image(0), "and", image(0))],
    "three clips of different lengths": [user(clip(0), "first", clip(1), clip(2), "last")],
    "system prompt": [{"role": "system", "content": [text("Answer in one word.")]}, user(image(0), clip(0), "Well?")],
    "several turns": [
        user(image(0), "What is this?"),
        assistant("A temple."),
        user("And this?", image(1)),
        assistant("A flower."),
        user(clip(0), "And what was said?"),
    ],
}


@pytest.mark.parametrize("messages", MESSAGES.values(), ids=MESSAGES)
def test_media_anywhere_equal_transformers(request, model, oracle, messages):
    assert_equals_transformers(request.node.callspec.id, model, oracle, messages)


def test_batch_equals_each_prompt_alone_and_transformers(model, oracle):
    batch = [
        [user("Which river is the longest?")],
        [user("What is this?", image(1))],
        [user(clip(2), "Go on.")],
        IMAGE_AND_CLIP,
    ]
    steps, engine = 16, model.engine
    prompts = [model.encode(messages, OPTIONS) for messages in batch]
    cache = engine.new_cache(len(prompts), max(map(len, prompts)) + steps)
    rows = [engine.prefill(cache, row, prompt.ids, prompt.spans).copy() for row, prompt in enumerate(prompts)]
    logits, decoder = [np.stack(rows)], engine.step_runner(cache)
    while len(logits) < steps:
        logits.append(decoder.step(logits[-1].argmax(-1), np.full(len(prompts), True)).copy())
    together = np.stack(logits, axis=1)  # [B, N, V]
    generated = model.generate(batch, max_new_tokens=steps, image_size=SIZE)
    for row, (messages, prompt, result) in enumerate(zip(batch, prompts, generated, strict=True)):
        alone = generate_greedily(model, prompt.ids, steps, prompt.spans)
        assert_close(f"row {row}, {len(prompt)} tokens", together[row], alone.logits, SAME_GRAPH)
        assert together[row].argmax(-1).tolist() == alone.tokens == oracle.tokens(oracle.inputs(messages), steps)
        assert list(result.token_ids) == alone.tokens[: len(result.token_ids)]


def test_video_equals_transformers_given_its_frames_as_images(model, oracle, tmp_path):
    import av
    from PIL import Image

    film = video(tmp_path / "film.mp4", 10, fps=5, draw=lambda n: np.roll(gradient(96, 64), 3 * n, axis=1))
    with av.open(str(film)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    frames = [{"type": "image", "image": Image.fromarray(frame)} for frame in every[::5]]
    assert len(frames) == 10
    messages = [user({"type": "video", "video": str(film)}, "What moves?")]
    inputs = oracle.inputs([user(*frames, "What moves?")])
    prompt = model.encode(messages, MediaOptions(image_size=SIZE, video_fps=1))
    assert prompt.ids == inputs.ids and len({span.key for span in prompt.spans}) == 10
    ours = generate_greedily(model, prompt.ids, 8, prompt.spans)
    theirs = oracle.logits(ours.oracle_ids, inputs.media, 8)
    assert_close(f"10 frames, {len(prompt)} tokens", ours.logits, theirs, TOLERANCE)
    assert_same_choices(ours, theirs)
    generated = model.generate(messages, max_new_tokens=8, image_size=SIZE, video_fps=1)
    assert list(generated.token_ids) == ours.tokens[: len(generated.token_ids)]


def test_long_speech_in_pieces_equals_transformers_given_the_pieces(model, oracle):
    samples, rate = speech(" ".join(SENTENCES * 5), RATE_HZ)
    first, second = fit(samples, model.manifest.audio.log_mel, "split")
    assert 30 * rate < len(samples) == len(first) + len(second)
    whole, *pieces = ({"type": "audio", "audio": (part, rate)} for part in (samples, first, second))
    prompt = model.encode([user(whole, "What was said?")], MediaOptions(long_audio="split"))
    inputs = oracle.inputs([user(*pieces, "What was said?")])
    assert prompt.ids == inputs.ids and len(prompt.spans) == 2
    ours = generate_greedily(model, prompt.ids, 8, prompt.spans)
    theirs = oracle.logits(ours.oracle_ids, inputs.media, 8)
    assert_close(f"{len(samples) / rate:.1f} s cut at {len(first) / rate:.1f} s", ours.logits, theirs, TOLERANCE)
    assert_same_choices(ours, theirs)


def test_openai_parts_are_the_same_prompt(model):
    samples, rate = clip(0)["audio"]
    png, wav = encoded(image(0)["image"], "PNG"), sound(samples, rate, "WAV", "FLOAT")
    as_text = {kind: base64.b64encode(data).decode() for kind, data in (("png", png), ("wav", wav))}
    openai = user(
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{as_text['png']}"}},
        {"type": "input_audio", "input_audio": {"data": as_text["wav"], "format": "wav"}},
        "What is said here?",
    )
    native, other = (model.encode(messages, OPTIONS) for messages in (IMAGE_AND_CLIP, [openai]))
    assert native.ids == other.ids and native.keys() == other.keys()
    results = [model.generate(m, max_new_tokens=16, image_size=SIZE) for m in (IMAGE_AND_CLIP, [openai])]
    assert results[0].token_ids == results[1].token_ids


@pytest.fixture(scope="module")
def hard_ids(shallow_multimodal_model):
    """Plain ids of text, vision and audio tokens, the first and last of each included."""
    manifest = shallow_multimodal_model.manifest
    first, count = manifest.first_hard_token_id, manifest.vocab_size
    middle = (first + count) // 2
    soft = {manifest.vision.soft_tokens.token_id, manifest.audio.soft_tokens.token_id}
    some = np.random.default_rng(0).integers(first, count, 24).tolist()
    return [2, 7, first, middle - 1, middle, count - 1, *some, 9, *soft, 11]


@pytest.mark.parametrize("modalities", [None, ("text",)])
def test_hard_multimodal_tokens_equal_transformers(
    shallow_multimodal_checkpoint, exported, oracle, hard_ids, modalities
):
    model = OnnxGemma3n.from_pretrained(exported(shallow_multimodal_checkpoint, modalities=modalities))
    ours = generate_greedily(model, hard_ids, 16)
    theirs = oracle.logits(ours.oracle_ids, {}, 16)
    assert_close(f"hard tokens, modalities {modalities}", ours.logits, theirs, TOLERANCE)
    assert_same_choices(ours, theirs)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_narrow_storage_of_all_parts_equals_transformers_on_rounded_weights(
    shallow_multimodal_checkpoint, exported, precision
):
    model = OnnxGemma3n.from_pretrained(exported(shallow_multimodal_checkpoint, precision=precision))
    rounded = MultimodalOracle.load(shallow_multimodal_checkpoint)
    round_weights(rounded, DTYPES[precision])
    assert_equals_transformers(f"{precision} storage", model, rounded, IMAGE_AND_CLIP)


def test_image_across_chunk_borders_equals_prefill_at_once(shallow_multimodal_checkpoint, exported, model):
    prompt = model.encode([TEXT_FIRST], OPTIONS)
    whole = generate_greedily(model, prompt.ids, 16, prompt.spans)
    for chunk in (100, 7 * WINDOW + 1):
        other = OnnxGemma3n.from_pretrained(exported(shallow_multimodal_checkpoint), prefill_chunk=chunk)
        prompt = other.encode([TEXT_FIRST], OPTIONS)
        assert any(span.start % chunk and span.start // chunk < (span.stop - 1) // chunk - 1 for span in prompt.spans)
        chunked = generate_greedily(other, prompt.ids, 16, prompt.spans)
        assert_close(f"chunks of {chunk}", chunked.logits, whole.logits, SAME_GRAPH)
        assert chunked.tokens == whole.tokens


def test_all_logits_equal_transformers_at_every_position(shallow_multimodal_checkpoint, exported, oracle):
    model = OnnxGemma3n.from_pretrained(exported(shallow_multimodal_checkpoint, logits="all"), prefill_chunk=100)
    prompt, inputs = model.encode([TEXT_FIRST], OPTIONS), oracle.inputs([TEXT_FIRST])
    assert prompt.ids == inputs.ids
    ours, theirs = model.engine.evaluate(prompt.ids, prompt.spans), oracle.logits(inputs.ids, inputs.media)
    assert_close(f"{len(prompt)} positions", ours, theirs, TOLERANCE)


@pytest.mark.parametrize(("precision", "target"), [("fp32", "cpu"), ("fp16", "cpu"), ("bf16", "cpu"), ("fp16", "cuda")])
def test_embedding_graph_agrees_with_the_engine_bit_for_bit(shallow_multimodal_checkpoint, exported, precision, target):
    folder = exported(shallow_multimodal_checkpoint, precision=precision, target=target)
    model = OnnxGemma3n.from_pretrained(folder, "cpu", prefill_chunk=4096)
    # Encoders for CUDA compute in bf16, which the CPU lacks.
    model.prompts.encoders = Encoders(folder, model.manifest, exact_provider(CPUProvider()))
    prompt = model.encode([TEXT_FIRST], OPTIONS)
    prompt = type(prompt)([*prompt.ids, *random_prompt(20, vocab_size=1280)], prompt.spans)
    manifest = model.manifest
    features = {"image_features": [], "audio_features": []}
    for span in prompt.spans:
        modality = "image" if prompt.ids[span.start] == manifest.vision.soft_tokens.token_id else "audio"
        features[f"{modality}_features"].append(span.features())
    inputs = {name: np.concatenate(parts) for name, parts in features.items()}
    graph = Session(folder / manifest.embedding.file, CPUProvider())
    made = graph.run({"input_ids": np.array([prompt.ids]), **inputs})["inputs_embeds"]
    ((_, ours),) = model.engine._chunks(prompt.ids, prompt.spans, 0)
    assert made.dtype == ours.dtype
    np.testing.assert_array_equal(made.view(np.uint8), ours.view(np.uint8))
