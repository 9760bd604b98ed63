"""Raw prompts with images and clips: transformers' processor and model as the oracle of every way to give one."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import soundfile
from PIL import Image
from starlette.testclient import TestClient

from gemma3n_onnx.runtime import MediaOptions, OnnxGemma3n
from gemma3n_onnx.runtime.serve.app import create_app
from gemma3n_onnx.runtime.serve.model_pool import ModelPool, ServeOptions
from gemma3n_onnx.runtime.serve.service import Limits
from multimodal import SIZE, MultimodalOracle, assert_same_choices, clip, image
from oracle import TOLERANCE, assert_close, generate_greedily
from support import run_command

DEMO = Path(__file__).parents[2] / "demo"
PICTURE, SOUND = str(DEMO / "picture.png"), str(DEMO / "sound.wav")
STEPS = 24

# From the base models' cards, and a turn written by hand.
IMAGE = "<image_soft_token> in this image, there is"
ASKED = "<start_of_turn>user\n<image_soft_token>What is in the picture?<end_of_turn>\n<start_of_turn>model\n"
BOTH = (
    "<start_of_turn>user\n<audio_soft_token>Here is a sound, and <image_soft_token>here a picture. "
    "What do you see and hear?<end_of_turn>\n<start_of_turn>model\n"
)
PROMPTS = {"image": (IMAGE, False), "question": (ASKED, False), "image with sound": (BOTH, True)}
prompts = pytest.mark.parametrize("name", PROMPTS)


@pytest.fixture(scope="module")
def oracle() -> MultimodalOracle:
    return MultimodalOracle.load(DEMO)


@pytest.fixture(scope="module")
def folder(demo_artifact) -> Path:
    return demo_artifact("E4B")


@pytest.fixture(scope="module")
def model(folder: Path) -> OnnxGemma3n:
    return OnnxGemma3n.from_pretrained(folder)


@pytest.fixture(scope="module")
def expected(oracle: MultimodalOracle):
    """By name: the prompt's ids, and the tokens that transformers generates, which go on after an end token."""
    picture, sound = Image.open(PICTURE).convert("RGB"), soundfile.read(SOUND, dtype="float32")[0]
    made = {}
    for name, (prompt, with_sound) in PROMPTS.items():
        inputs = oracle.text_inputs(prompt, [picture], [sound] if with_sound else [])
        made[name] = (inputs, oracle.tokens(inputs, STEPS))
    return made


def ended(tokens: list[int], model: OnnxGemma3n) -> list[int]:
    """Up to the first end token."""
    ends = [place for place, token in enumerate(tokens) if token in model.manifest.eos_token_ids]
    return tokens[: ends[0] + 1] if ends else tokens


@prompts
def test_python(name: str, model: OnnxGemma3n, oracle: MultimodalOracle, expected) -> None:
    (prompt, with_sound), (inputs, tokens) = PROMPTS[name], expected[name]
    media = {"images": [PICTURE], "audio": [SOUND] if with_sound else None}
    encoded = model.encode(prompt, **media)
    assert encoded.ids == inputs.ids
    ours = generate_greedily(model, encoded.ids, STEPS, encoded.spans)
    theirs = oracle.logits(ours.oracle_ids, inputs.media, STEPS)
    assert_close(f"{name}, {len(encoded)} tokens", ours.logits, theirs, TOLERANCE)
    assert_same_choices(ours, theirs)
    assert ours.tokens == tokens
    made = model.generate(prompt, max_new_tokens=STEPS, **media)
    assert (list(made.prompt_token_ids), list(made.token_ids)) == (inputs.ids, ended(tokens, model))
    streamed = model.stream(prompt, max_new_tokens=STEPS, **media)
    assert "".join(streamed) == made.text
    by_ids = model.generate(inputs.ids, max_new_tokens=STEPS, **media)
    assert by_ids.token_ids == made.token_ids
    print(f"{name}: {made.text!r}")


@prompts
def test_command_line(name: str, folder: Path, model: OnnxGemma3n, expected, monkeypatch) -> None:
    (prompt, with_sound), (inputs, tokens) = PROMPTS[name], expected[name]
    command = ["gemma3n", "run", str(folder), prompt, "--raw", "--image", PICTURE, "--json"]
    outcome = run_command(
        monkeypatch, [*command, *(["--audio", SOUND] if with_sound else []), "--max-new-tokens", str(STEPS)]
    )
    assert (outcome.code, outcome.err) == (0, "")
    made = json.loads(outcome.out)
    assert (made["prompt_token_ids"], made["token_ids"]) == (inputs.ids, ended(tokens, model))


@prompts
def test_completions(name: str, folder: Path, model: OnnxGemma3n, expected) -> None:
    (prompt, with_sound), (inputs, tokens) = PROMPTS[name], expected[name]
    pool = ModelPool([folder], ServeOptions(rows=1, context=1024), {"threads": 1})
    body = {"prompt": prompt, "images": [data_url(PICTURE, "image/png")], "temperature": 0, "max_tokens": STEPS}
    if with_sound:
        body["audio"] = [data_url(SOUND, "audio/wav")]
    with TestClient(create_app(pool, Limits())) as client:
        answer = client.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == model.tokenizer.decode(ended(tokens, model))
    made = ended(tokens, model)
    assert answer["usage"]["prompt_tokens"] == len(inputs.ids)
    assert answer["usage"]["completion_tokens"] == len(made)


def data_url(file: str, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(Path(file).read_bytes()).decode()}"


def test_several_images_and_clips_and_a_batch(model: OnnxGemma3n, oracle: MultimodalOracle) -> None:
    """In any order; each prompt of a batch has its own."""
    prompt = "First <image_soft_token><audio_soft_token> and then <image_soft_token>, <audio_soft_token>."
    pictures, sounds = [image(0), image(1)], [clip(0), clip(1)]
    images, audio = [part["image"] for part in pictures], [part["audio"] for part in sounds]
    inputs = oracle.text_inputs(prompt, images, [samples for samples, _ in audio])
    encoded = model.encode(prompt, MediaOptions(image_size=SIZE), images=images, audio=audio)
    assert encoded.ids == inputs.ids
    ours = generate_greedily(model, encoded.ids, STEPS, encoded.spans)
    theirs = oracle.logits(ours.oracle_ids, inputs.media, STEPS)
    assert_close(f"two of each, {len(encoded)} tokens", ours.logits, theirs, TOLERANCE)
    assert_same_choices(ours, theirs)
    batch = ["no media", prompt, "<image_soft_token> there is"]
    options = {"image_size": SIZE, "max_new_tokens": 4}
    together = model.generate(batch, images=[None, images, images[1:]], audio=[[], audio, None], **options)
    alone = [
        model.generate(batch[0], **options),
        model.generate(batch[1], images=images, audio=audio, **options),
        model.generate(batch[2], images=images[1:], **options),
    ]
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
