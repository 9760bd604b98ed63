"""The demo that comes with the project answers right: every slice, through every runtime, on what it has never seen.

An exported slice that runs but is wrong somewhere answers nonsense here, whatever its logits look like.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gemma3n_onnx.export.slicing import load_slices
from gemma3n_onnx.runtime import MediaOptions, OnnxGemma3n
from gemma3n_onnx.runtime.prompt.messages import items_of
from gemma3n_onnx.training.conversations import Conversation, messages_of, random_row
from gemma3n_onnx.training.evaluate import examine, sources_of
from gemma3n_onnx.training.exam import exam, later_exam
from gemma3n_onnx.training.pictures import random_picture
from gemma3n_onnx.training.prompts import ConversationEncoder
from gemma3n_onnx.training.sounds import random_sound
from heic import heic
from media import encoded
from multimodal import MultimodalOracle
from oracle import log_softmax
from support import run_command

DEMO = Path(__file__).parents[2] / "demo"
HEIC = Path(__file__).parents[1] / "runtime" / "media" / "picture.heic"
SLICES = [spec.name for spec in load_slices(DEMO / "slices.csv").specs]
WHOLE = "E4B"
EACH, EACH_LATER, EACH_OF_ALL, EACH_OF_OTHERS = 4, 1, 12, 1
SEED = 77
MAX_NEW_TOKENS, WINDOW = 48, 128
SAME_NATS = 1e-3  # of fp32 log-probabilities, summed over a whole answer


@pytest.fixture(scope="session")
def demo(demo_artifact):
    """`demo(slice)`: the exported demo, loaded."""

    @functools.cache
    def load(name: str) -> tuple[Path, OnnxGemma3n]:
        return demo_artifact(name), OnnxGemma3n.from_pretrained(demo_artifact(name))

    return load


@pytest.fixture(scope="session")
def oracle() -> MultimodalOracle:
    return MultimodalOracle.load(DEMO)


@pytest.fixture(scope="session")
def questions() -> dict[str, list[Conversation]]:
    return exam(SEED, EACH)


def test_the_whole_model_answers_as_transformers_and_right(demo, oracle, questions):
    _, model = demo(WHOLE)
    assert_right(assert_answers_as_transformers(model, oracle, questions), questions)
    later = later_exam(SEED, EACH_LATER)
    assert_right(assert_answers_as_transformers(model, oracle, later), later)


@pytest.mark.full_size
def test_more_answers_are_transformers_and_right(demo, oracle):
    _, model = demo(WHOLE)
    questions, later = exam(SEED, EACH_OF_ALL), later_exam(SEED, EACH_OF_ALL)
    assert min(sum(map(len, asked.values())) for asked in (questions, later)) >= 200
    assert_right(assert_answers_as_transformers(model, oracle, questions), questions)
    assert_right(assert_answers_as_transformers(model, oracle, later), later)


def answer(model, conversation):
    messages = messages_of(conversation, sources_of(conversation))
    return model.generate(messages, max_new_tokens=MAX_NEW_TOKENS)


def assert_answers_as_transformers(model, oracle, questions) -> dict[str, int]:
    """Token for token: the tokens are transformers' choices at every step of the answer. Returns how many answers of
    each task are right."""
    right = dict.fromkeys(questions, 0)
    # One after the other: the threads of two libraries, taking turns, wait for each other.
    answers = {task: [answer(model, conversation) for conversation in asked] for task, asked in questions.items()}
    for task, asked in questions.items():
        for conversation, ours in zip(asked, answers[task], strict=True):
            inputs = oracle.inputs(messages_of(conversation, sources_of(conversation)))
            assert list(ours.prompt_token_ids) == inputs.ids
            made = list(ours.token_ids)
            logits = oracle.logits([*inputs.ids, *made[:-1]], inputs.media, len(made))
            assert made == logits.argmax(-1).tolist(), conversation.turns[-1].question
            right[task] += ours.text == conversation.turns[-1].answer
    print(f"{sum(map(len, questions.values()))} prompts, right: {right}")
    return right


def assert_right(right, questions):
    if min(map(len, questions.values())) > 1:
        assert all(right[task] >= 0.75 * len(asked) for task, asked in questions.items())
    assert sum(right.values()) >= 0.95 * sum(map(len, questions.values()))


def test_scores_are_those_of_transformers(demo, oracle):
    """-ln p of right answers, and whether greedy decoding gives them."""
    _, model = demo(WHOLE)
    tasks = later_exam(SEED, 1)
    scores = examine(model, tasks)
    errors = []
    for task, [conversation] in tasks.items():
        inputs = oracle.inputs(messages_of(conversation, sources_of(conversation)))
        ids = model.tokenizer.encode(f"{conversation.turns[-1].answer}<end_of_turn>", add_bos=False)
        chances = log_softmax(oracle.logits([*inputs.ids, *ids[:-1]], inputs.media, len(ids)))
        nats = -chances[np.arange(len(ids)), ids].sum()
        errors += [abs(scores.nats[task] - nats), abs(scores.chance[task] - math.exp(-nats))]
        assert scores.right[task] == (answer(model, conversation).text == conversation.turns[-1].answer)
    print(f"-ln p and p of {len(tasks)} right answers: error {max(errors):.1e} (tolerance {SAME_NATS:.0e})")
    assert max(errors) < SAME_NATS


@pytest.mark.parametrize("name", [name for name in SLICES if name != WHOLE])
def test_every_slice_answers_right(demo, questions, name):
    _, model = demo(name)
    tasks = questions | later_exam(SEED, EACH_OF_OTHERS)
    scores = examine(model, {task: asked[:EACH_OF_OTHERS] for task, asked in tasks.items()}).right
    mean = sum(scores.values()) / len(scores)
    print(f"{name}: {mean:.2f}, not all right: { {t: s for t, s in scores.items() if s < 1} }")
    assert mean >= 0.9


def test_training_and_runtime_write_a_prompt_alike(demo):
    _, model = demo(WHOLE)
    encoder, rng = ConversationEncoder(DEMO), np.random.default_rng(0)
    for _ in range(5):
        [conversation] = random_row(rng, random_picture(rng), random_sound(rng), 1)
        prompt = model.encode(messages_of(conversation, sources_of(conversation))).ids
        assert encoder.encode(conversation).ids[: len(prompt)] == prompt


def test_a_chat_goes_on_about_its_picture(demo):
    _, model = demo(WHOLE)
    chat = model.chat()
    first = chat.send([{"type": "image", "image": DEMO / "picture.png"}, {"type": "text", "text": "What do you see?"}])
    assert first.text == PICTURE
    assert chat.send("What colour is the star?").text == "The star is yellow."
    assert chat.send("Where is the circle?").text == "The circle is at the top left."
    assert chat.send("How many shapes are there?").text == f"{PICTURE[:-1].replace(',', ' and')}: three shapes."


def test_a_chat_goes_on_about_everything(demo):
    _, model = demo("E2B")
    chat = model.chat()
    sound = {"type": "audio", "audio": DEMO / "sound.wav"}
    picture = {"type": "image", "image": DEMO / "picture.png"}
    asked = [
        ("What is 3 plus 4?", "3 plus 4 is 7."),
        ([{"type": "text", "text": "What do you see?"}, picture], PICTURE),
        ("What is 8 plus 5?", "8 plus 5 is 13."),
        ([sound, {"type": "text", "text": "What do you hear?"}], SOUND),
        ("What colour is the star?", "The star is yellow."),
        ("Repeat: stone river cloud", "stone river cloud"),
    ]
    assert [chat.send(question).text for question, _ in asked] == [expected for _, expected in asked]


PICTURE = "A red circle, a yellow star and a blue square."
SOUND = "Three high beeps."


@pytest.mark.parametrize(
    ("question", "media", "expected"),
    [
        ("What is in the picture?", ["--image", "picture.png"], PICTURE),
        ("What do you hear?", ["--audio", "sound.wav"], SOUND),
        ("What is 3 plus 4?", [], "3 plus 4 is 7."),
    ],
)
def test_the_first_commands_of_the_readme(demo, monkeypatch, question, media, expected):
    folder, _ = demo("E2B")
    media = [str(DEMO / part) if part.endswith(("png", "wav")) else part for part in media]
    outcome = run_command(monkeypatch, ["gemma3n", "run", str(folder), question, *media])
    assert (outcome.code, outcome.out.strip()) == (0, expected)


def picture_as(format: str, **options) -> bytes:
    return encoded(Image.open(DEMO / "picture.png").convert("RGB"), format, **options)


def streamed_sound() -> bytes:
    wav = (DEMO / "sound.wav").read_bytes()
    size = wav.index(b"data") + 4
    return wav[:4] + b"\xff" * 4 + wav[8:size] + b"\xff" * 4 + wav[size + 4 :]


@pytest.mark.parametrize(
    ("option", "name", "content", "warning"),
    [
        ("--image", "picture.heic", HEIC.read_bytes, ""),
        ("--image", "tiles.heic", lambda: heic(Image.open(DEMO / "picture.png").convert("RGB"), 128), ""),
        ("--image", "picture.avif", lambda: picture_as("AVIF"), ""),
        ("--image", "cut.jpg", lambda: picture_as("JPEG", quality=95)[:-900], "The end of the JPEG is missing, so "),
        ("--audio", "stream.wav", streamed_sound, "The WAV does not declare its length, so it was read to the end of "),
        ("--audio", "cut.wav", lambda: (DEMO / "sound.wav").read_bytes()[:-2_000], "The WAV is cut off: it declares "),
    ],
)
def test_files_of_other_formats_and_incomplete_ones(demo, monkeypatch, tmp_path, option, name, content, warning):
    """The right answer, and one line on stderr that names the file and says what it lacks."""
    folder, model = demo("E2B")
    path = tmp_path / name
    path.write_bytes(content())
    kind = option.removeprefix("--")
    question, expected = {"image": ("What is in the picture?", PICTURE), "audio": ("What do you hear?", SOUND)}[kind]
    outcome = run_command(monkeypatch, ["gemma3n", "run", str(folder), question, option, str(path)])
    assert (outcome.code, outcome.out.strip()) == (0, expected)
    lines = outcome.err.splitlines()
    assert len(lines) == bool(warning) and all(name in line and f": {warning}" in line for line in lines)

    parts = [{"type": kind, kind: path.read_bytes()}, {"type": "text", "text": question}]
    result = model.generate([{"role": "user", "content": parts}])
    assert (result.text, len(result.warnings)) == (expected, bool(warning))
    assert all(told.startswith(f"{kind} 1: {warning}") for told in result.warnings)


def test_a_chat_warns_of_a_file_in_its_own_turn_only(demo):
    _, model = demo("E2B")
    chat = model.chat()
    picture = {"type": "image", "image": picture_as("JPEG", quality=95)[:-900]}
    first = chat.send([picture, {"type": "text", "text": "What is in the picture?"}])
    assert first.text == PICTURE and len(first.warnings) == 1
    assert chat.send("What colour is the star?").warnings == ()


@pytest.mark.parametrize("name", ["E4B", "E2B"])
def test_onnxruntime_genai_answers_the_same(demo, questions, name):
    genai_loop = pytest.importorskip("genai_loop")
    folder, model = demo(name)
    theirs = genai_loop.og.Model(str(folder))
    for task in ("describe", "hear", "see and hear", "where", "sum", "repeat"):
        conversation = questions[task][0]
        messages = messages_of(conversation, sources_of(conversation))
        expected = model.generate(messages, max_new_tokens=MAX_NEW_TOKENS)
        prompt, items = model.encode(messages), items_of(model.read(messages, MediaOptions()))
        feed = genai_loop.by_inputs(prompt, items) if items else genai_loop.by_tokens(prompt)
        tokens, _ = genai_loop.greedily(theirs, prompt, feed, MAX_NEW_TOKENS, room=WINDOW)
        assert tokens == list(expected.token_ids[:-1])
        assert expected.finish_reason == "stop"
        assert expected.text == conversation.turns[-1].answer
