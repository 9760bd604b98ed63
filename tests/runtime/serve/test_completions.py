"""/v1/completions, asked by OpenAI's own client."""

from __future__ import annotations

from dataclasses import replace

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
        ({"prompt": [WITH_IMAGE, "x"], "images": ["picture.png"]}, "images must be a list of lists"),
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


ECHO = {"echo": True, "max_tokens": 0}
TURN = "<start_of_turn>user\nWhat is 3 plus 4? é👩‍👩<end_of_turn>\n<start_of_turn>model\n"


@pytest.mark.parametrize("more", [{}, {"logprobs": 2}, {"logprobs": 2, "max_tokens": 0}, {"max_tokens": 0}], ids=str)
def test_an_echo_is_the_prompt_as_given_and_a_stream_has_the_same(server, more):
    body = {"prompt": [TURN, "Kira", "<bos>Kira", "<bos>"], "n": 2, "echo": True, "max_tokens": 4} | more
    whole = complete(server, **body).json()["choices"]
    given = [prompt for prompt in body["prompt"] for _ in range(2)]
    assert all(choice["text"].startswith(prompt) for choice, prompt in zip(whole, given))
    assert "max_tokens" not in more or [choice["text"] for choice in whole] == given
    chunks = server.client.completions.create(model=E2B, temperature=0, stream=True, **body)
    streamed = [{"text": "", "logprobs": None, "finish_reason": None} for _ in whole]
    for (part,) in (chunk.choices for chunk in chunks):
        one = streamed[part.index]
        one["text"] += part.text
        one["finish_reason"] = part.finish_reason or one["finish_reason"]
        if part.logprobs is not None:
            one["logprobs"] = one["logprobs"] or {name: [] for name in whole[0]["logprobs"]}
            for name in one["logprobs"]:
                one["logprobs"][name] += getattr(part.logprobs, name)
    assert streamed == [{name: choice[name] for name in streamed[0]} for choice in whole]
    for choice in whole if "logprobs" in more else ():
        listed = choice["logprobs"]
        assert listed["text_offset"] == sorted(listed["text_offset"]) and listed["token_logprobs"][0] is None
        for token, offset in zip(listed["tokens"], listed["text_offset"]):
            known = not token.startswith("\\x") and token not in ("<bos>", "<end_of_turn>")
            assert not known or choice["text"].startswith(token, offset)


def test_a_prompt_may_fill_the_context_if_nothing_is_generated(server):
    fits, longer = (complete(server, prompt=[2] * count, **ECHO) for count in (1024, 1025))
    assert fits.status_code == 200 and fits.json()["usage"]["prompt_tokens"] == 1024
    assert longer.status_code == 400 and "1,025 tokens" in longer.json()["error"]["message"]


def test_a_prompt_is_scored_once_for_its_answers(server, monkeypatch):
    engine, ran = server.pool.loaded[E2B].model.engine, []
    score = engine.score
    monkeypatch.setattr(engine, "score", lambda *each, **more: ran.append(each) or score(*each, **more))
    answer = complete(server, prompt=[TURN, "Kira"], n=3, echo=True, logprobs=0, max_tokens=1)
    choices = answer.json()["choices"]
    assert len(ran) == 2 and server.pool.loaded[E2B].scores
    for same in (choices[:3], choices[3:]):
        assert len({str(choice["logprobs"]["token_logprobs"][:-1]) for choice in same}) == 1
    complete(server, prompt="Kira", **ECHO)
    assert len(ran) == 2, "nobody asked for log-probabilities"


def test_scored_prompts_are_no_first_tokens(server):
    def counted() -> list[str]:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return [line for line in lines if line.startswith("gemma3n_first_token_seconds_count")]

    before = counted()
    assert complete(server, prompt="Kira", logprobs=0, **ECHO).status_code == 200
    assert counted() == before


def test_prompts_that_never_fit_the_queue_are_400(server):
    answer = complete(server, prompt=["a"] * 69, **ECHO)
    assert answer.status_code == 400 and "69 answers, but this server takes at most 68" in answer.text


def test_an_artifact_without_a_scorer_is_400(server, model, monkeypatch):
    complete(server, prompt="Kira", **ECHO)
    monkeypatch.setattr(server.pool.loaded[E2B].model, "manifest", replace(model.manifest, scorer=None))
    answer = complete(server, prompt="Kira", logprobs=0, **ECHO)
    assert answer.status_code == 400 and "no graph that scores given text" in answer.json()["error"]["message"]
    assert complete(server, prompt="Kira", **ECHO).status_code == 200
