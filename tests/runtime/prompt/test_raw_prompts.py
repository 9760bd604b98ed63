"""Raw prompts and the media beside them: what is accepted, as transformers' processor does it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoProcessor

from gemma3n_onnx.runtime import FetchPolicy, MediaError, MediaOptions, OnnxGemma3n, PromptError, UrlRefusedError

DEMO = Path(__file__).parents[3] / "demo"
IMAGE, AUDIO = "<image_soft_token>", "<audio_soft_token>"
PICTURE = np.zeros((32, 32, 3), np.uint8)
RATE_HZ = 16_000
SOUND = np.sin(np.arange(RATE_HZ) / 9).astype(np.float32)
CLIP = (SOUND, RATE_HZ)
IMAGES = {"images": [PICTURE]}
CLIPS = {"audio": [CLIP]}


@pytest.fixture(scope="module")
def model(demo_artifact) -> OnnxGemma3n:
    return OnnxGemma3n.from_pretrained(demo_artifact("E2B"))


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(DEMO)


def for_transformers(media: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: [source[0] if name == "audio" else source for source in sources] for name, sources in media.items()}


@pytest.mark.parametrize(
    ("prompt", "media"),
    [
        ("no media", {}),
        (f"{IMAGE} there is", IMAGES),
        (f"<bos>{IMAGE}", IMAGES),
        (f"a {AUDIO}b {IMAGE} c{AUDIO}", {"images": [PICTURE], "audio": [CLIP, CLIP]}),
        (f"{IMAGE}{IMAGE}", {"images": [PICTURE, PICTURE]}),
        ("<start_of_image> stands for no image", {}),
        ("<start_of_turn>user\nHi<end_of_turn>\n", {}),
    ],
)
def test_ids_are_those_of_transformers(model: OnnxGemma3n, processor: Any, prompt: str, media: dict[str, Any]) -> None:
    theirs = processor(text=prompt.removeprefix("<bos>"), **for_transformers(media))["input_ids"][0]
    encoded = model.encode(prompt, **media)
    assert encoded.ids == list(theirs)
    assert len(encoded.spans) == sum(map(len, media.values()))
    assert [encoded.ids[span.start] for span in encoded.spans] == [encoded.ids[span.stop - 1] for span in encoded.spans]
    assert [span.start for span in encoded.spans] == sorted(span.start for span in encoded.spans)


@pytest.mark.parametrize(
    ("prompt", "media", "says"),
    [
        (f"{IMAGE} there is", {}, (f"{IMAGE} in the prompt is 1", "of images given with it is 0")),
        (f"{AUDIO} there is", {}, (f"{AUDIO} in the prompt is 1", "audio clips given with it is 0")),
        ("there is", IMAGES, (f"{IMAGE} in the prompt is 0", "images given with it is 1")),
        ("there is", CLIPS, (f"{AUDIO} in the prompt is 0", "audio clips given with it is 1")),
        ("<start_of_image> there is", IMAGES, (f"{IMAGE} in the prompt is 0",)),
        (f"{AUDIO} there is", IMAGES, (f"{IMAGE} in the prompt is 0",)),
        (f"{IMAGE} there is", CLIPS, (f"{IMAGE} in the prompt is 1",)),
        (f"{IMAGE}{IMAGE} there are", IMAGES, (f"{IMAGE} in the prompt is 2", "is 1")),
        (f"{IMAGE} there are", {"images": [PICTURE, PICTURE]}, (f"{IMAGE} in the prompt is 1", "is 2")),
    ],
)
def test_other_placeholders_than_media_are_refused_as_by_transformers(
    model: OnnxGemma3n, processor: Any, prompt: str, media: dict[str, Any], says: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match="tokens"):
        processor(text=prompt, **for_transformers(media))
    with pytest.raises(PromptError) as caught:
        model.encode(prompt, **media)
    assert all(part in str(caught.value) for part in says), caught.value
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_token_ids_may_hold_the_soft_tokens(model: OnnxGemma3n) -> None:
    media = {"images": [PICTURE], "audio": [CLIP]}
    text = model.encode(f"{AUDIO} and {IMAGE}", **media)
    ids = model.encode(np.array(text.ids), **media)
    places = [(span.start, span.stop, span.key) for span in text.spans]
    assert ids.ids == text.ids
    assert [(span.start, span.stop, span.key) for span in ids.spans] == places


@pytest.mark.parametrize(
    "edit",
    [
        lambda ids, token: [id_ for id_ in ids if id_ != token],
        lambda ids, token: ids[: ids.index(token)] + ids[ids.index(token) + 1 :],
        lambda ids, token: [*ids, token],
        lambda ids, token: [*ids, *ids],
    ],
    ids=["none", "one too few", "a stray one", "twice"],
)
def test_token_ids_with_other_soft_tokens_than_media_are_refused(model: OnnxGemma3n, edit: Any) -> None:
    ids = model.encode(f"{IMAGE} there is", images=[PICTURE]).ids
    token = model.manifest.encoders["vision"].soft_tokens.token_id
    with pytest.raises(
        PromptError, match=f"runs of 256 {IMAGE} in the token ids is ., but that of images given with them is 1"
    ):
        model.encode(edit(ids, token), images=[PICTURE])


def test_long_audio_takes_one_placeholder_and_as_many_clips_as_it_has(model: OnnxGemma3n) -> None:
    long = (np.tile(SOUND, 65), RATE_HZ)
    prompt = model.encode(f"{AUDIO} is loud", MediaOptions(long_audio="split"), audio=[long])
    assert len(prompt.spans) == 3
    alone = model.encode(f"{AUDIO}{AUDIO}{AUDIO} is loud", audio=[CLIP] * 3)
    assert prompt.ids == alone.ids


@pytest.mark.parametrize(
    ("prompt", "media", "says"),
    [
        (f"{IMAGE} there is", {"images": "photo.jpg"}, "images must be a list"),
        (f"{AUDIO} there is", {"audio": CLIP}, "audio must be a list"),
        ([{"role": "user", "content": "Hi"}], IMAGES, "put those of messages into their content"),
        (["one", IMAGE], {"images": [[PICTURE]]}, "In a batch, images must be a list of lists, one for each prompt"),
        (["one", IMAGE], {"images": [PICTURE, PICTURE]}, "In a batch, images must be a list of lists"),
        (["one", IMAGE], {"images": [[PICTURE], []]}, f"{IMAGE} in the prompt is 0"),
        ("", IMAGES, f"{IMAGE} in the prompt is 0"),
    ],
)
def test_media_in_another_form_are_refused(model: OnnxGemma3n, prompt: Any, media: dict[str, Any], says: str) -> None:
    with pytest.raises(PromptError, match=says) as caught:
        model.generate(prompt, **media)
    assert str(caught.value).endswith(".")


def test_the_fetch_policy_holds(model: OnnxGemma3n) -> None:
    with pytest.raises(MediaError, match=r"no file 'no\.png'"):
        model.encode(IMAGE, images=["no.png"])
    with pytest.raises(UrlRefusedError, match="not a public address"):
        model.encode(IMAGE, images=["http://127.0.0.1:1/x.png"])
    assert FetchPolicy().allow_private is False


def test_an_artifact_without_the_encoder_says_so(small_artifact: Path) -> None:
    with pytest.raises(MediaError, match="no vision encoder"):
        OnnxGemma3n.from_pretrained(small_artifact).generate(f"{IMAGE} there is", images=[PICTURE])
