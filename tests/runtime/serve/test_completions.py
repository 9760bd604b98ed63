"""/v1/completions, asked by OpenAI's own client."""

from __future__ import annotations

import httpx
import pytest

from serving import DEMO, E2B, SUM, data_url, message


def test_a_completion(server, model):
    prompt = model.prompts.render(model.read(message(SUM), None)).removeprefix("<bos>")
    made = server.client.completions.create(model=E2B, prompt=prompt, temperature=0, logprobs=1)
    assert made.choices[0].text == "3 plus 4 is 7."
    assert len(made.choices[0].logprobs.tokens) == made.usage.completion_tokens - 1, "the end token is not listed"
    pieces = server.client.completions.create(model=E2B, prompt=prompt, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == "3 plus 4 is 7."
    ids = [[2, 5, 6], [2, 7]]
    made = server.client.completions.create(model=E2B, prompt=ids, temperature=0, max_tokens=2, n=2)
    assert len(made.choices) == 4


RAW = "<start_of_turn>user\n{}What is in the picture?<end_of_turn>\n<start_of_turn>model\n"
WITH_IMAGE = RAW.format("<image_soft_token>")
PICTURE = "A red circle, a yellow star and a blue square."


def complete(server, **body):
    defaults = {"model": E2B, "temperature": 0, "max_tokens": 24}
    return httpx.post(f"{server.url}/v1/completions", json=defaults | body, timeout=60)


@pytest.mark.parametrize(
    "image", ["picture.png", data_url(DEMO / "picture.png")], ids=["a file of --media-folder", "data"]
)
def test_a_prompt_with_an_image(server, image):
    made = complete(server, prompt=WITH_IMAGE, images=[image]).json()
    assert made["choices"][0]["text"] == PICTURE
    assert made["usage"]["prompt_tokens"] > 256


def test_prompts_with_an_image_each_and_none(server):
    prompts = [WITH_IMAGE, RAW.format("").replace("What is in the picture?", SUM)]
    made = complete(server, prompt=prompts, images=[["picture.png"], []]).json()
    assert [choice["text"] for choice in made["choices"]] == [PICTURE, "3 plus 4 is 7."]


def test_a_streamed_completion_of_a_sound(server):
    prompt = RAW.replace("What is in the picture?", "What do you hear?").format("<audio_soft_token>")
    more = {"audio": ["sound.wav"]}
    pieces = server.client.completions.create(model=E2B, prompt=prompt, temperature=0, stream=True, extra_body=more)
    assert "".join(chunk.choices[0].text for chunk in pieces) == "Three high beeps."


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"prompt": WITH_IMAGE}, "<image_soft_token> in the prompt is 1, but that of images given with it is 0"),
        ({"prompt": RAW.format(""), "images": ["picture.png"]}, "<image_soft_token> in the prompt is 0"),
        ({"prompt": WITH_IMAGE, "audio": ["sound.wav"]}, "<image_soft_token> in the prompt is 1"),
        ({"prompt": WITH_IMAGE, "images": ["../README.md"]}, "README.md"),
        ({"prompt": WITH_IMAGE, "images": ["/etc/passwd"]}, "/etc/passwd"),
        ({"prompt": WITH_IMAGE, "images": ["ftp://x/y.png"]}, "neither an http nor an https URL"),
        ({"prompt": [WITH_IMAGE, "x"], "images": ["picture.png"]}, "one list for each of the 2 prompts"),
        ({"prompt": WITH_IMAGE, "images": ["picture.png"], "image_size": 100}, "image_size is 100"),
        ({"prompt": WITH_IMAGE, "images": "picture.png"}, "images"),
    ],
)
def test_media_that_do_not_fit_the_prompt_are_400(server, body, says):
    answer = complete(server, **body)
    assert answer.status_code in (400, 403), answer.text
    assert says in answer.json()["error"]["message"]


def test_a_prompt_with_an_image_is_echoed_with_its_log_probabilities(server):
    body = {"prompt": WITH_IMAGE, "images": ["picture.png"], "max_tokens": 1, "temperature": 0}
    plain, echoed = (complete(server, **body, **more).json() for more in ({}, {"echo": True, "logprobs": 1}))
    (choice,) = echoed["choices"]
    assert choice["text"].endswith(plain["choices"][0]["text"]) and "What is in the picture?" in choice["text"]
    assert len(choice["logprobs"]["token_logprobs"]) == echoed["usage"]["prompt_tokens"] + 1
    assert echoed["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"] > 256
    assert choice["logprobs"]["token_logprobs"][-1] == max(choice["logprobs"]["top_logprobs"][-1].values())


def test_one_token_after_a_scored_prompt_is_listed_even_if_it_ends_the_answer(server):
    """lm-evaluation-harness drops the last log-probability, which must not be one of the prompt's."""
    asked = "<start_of_turn>user\nWhat is 3 plus 4?<end_of_turn>\n<start_of_turn>model\n3 plus 4 is 7."
    answer = complete(server, prompt=asked, max_tokens=1, temperature=0, echo=True, logprobs=1).json()
    listed = answer["choices"][0]["logprobs"]
    assert listed["tokens"][-1] == "<end_of_turn>" and answer["choices"][0]["finish_reason"] == "stop"
    assert len(listed["token_logprobs"]) == len(listed["text_offset"]) == answer["usage"]["prompt_tokens"] + 1
