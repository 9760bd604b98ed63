"""/v1/chat/completions, asked by OpenAI's own client."""

from __future__ import annotations

import base64

import openai
import pytest

from serving import DEMO, E2B, SUM, chat, data_url, image, message


def test_an_answer_is_the_models(server, model):
    wanted = model.generate(message(SUM))
    answer = chat(server, message(SUM))
    (choice,) = answer.choices
    assert choice.message.content == wanted.text == "3 plus 4 is 7."
    assert (choice.finish_reason, choice.message.role, answer.model) == ("stop", "assistant", E2B)
    made, read = len(wanted.token_ids), len(wanted.prompt_token_ids)
    assert (answer.usage.completion_tokens, answer.usage.prompt_tokens) == (made, read)


def test_a_stream_holds_the_same(server):
    chunks = [*chat(server, message(SUM), stream=True, stream_options={"include_usage": True})]
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "3 plus 4 is 7."
    assert sum(bool(delta.content) for delta in deltas) > 3
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens > 3 and not chunks[-1].choices


@pytest.mark.parametrize(
    "source",
    ["picture.png", str(DEMO / "picture.png"), (DEMO / "picture.png").as_uri(), data_url(DEMO / "picture.png")],
)
def test_a_picture_by_path_and_as_data(server, source):
    answer = chat(server, message("What is in the picture?", image(source)))
    assert answer.choices[0].message.content == "A red circle, a yellow star and a blue square."


@pytest.mark.parametrize("source", ["/etc/hostname", "../README.md", "file:///etc/hostname", "file://host/x.png"])
def test_files_elsewhere_are_not_read(server, source):
    with pytest.raises(openai.BadRequestError):
        chat(server, message("What is in the picture?", image(source)))


def test_a_sound(server):
    data = base64.b64encode((DEMO / "sound.wav").read_bytes()).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    assert chat(server, message("What do you hear?", part)).choices[0].message.content == "Three high beeps."


def test_log_probabilities_are_the_models(server, model):
    wanted = model.generate(message(SUM), logprobs=3)
    for stream in (False, True):
        answer = chat(server, message(SUM), logprobs=True, top_logprobs=3, stream=stream)
        found = (
            [entry for chunk in answer for c in chunk.choices if c.logprobs for entry in c.logprobs.content]
            if stream
            else answer.choices[0].logprobs.content
        )
        assert len(found) == len(wanted.logprobs) - 1, "the end token is not listed"
        for ours, theirs in zip(found, wanted.logprobs[:-1], strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [top.logprob for top in ours.top_logprobs] == pytest.approx(
                [top.logprob for top in theirs.top], abs=1e-3
            )
    with pytest.raises(openai.BadRequestError, match="top_logprobs needs logprobs"):
        chat(server, message(SUM), top_logprobs=3)


def test_several_answers_and_seeds(server):
    options = {"temperature": 1.8, "n": 4, "max_tokens": 16}
    first, again, other = (chat(server, message(SUM), seed=seed, **options) for seed in (1, 1, 2))
    texts = [[choice.message.content for choice in answer.choices] for answer in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len({*texts[0]}) > 1
    assert first.usage.completion_tokens <= 4 * 16


def test_stop_bias_and_length(server, model):
    assert chat(server, message(SUM), stop=" is").choices[0].message.content == "3 plus 4"
    (first,) = model.generate(message(SUM), max_new_tokens=1).token_ids
    answer = chat(server, message(SUM), logit_bias={str(first): -100}, max_completion_tokens=3).choices[0]
    assert not answer.message.content.startswith("3") and answer.finish_reason == "length"


def test_what_a_prompt_shares_with_an_earlier_one_is_not_run(server):
    system = {"role": "system", "content": "You are brief. " * 20}
    asked = [chat(server, [system, *message(text)]) for text in (SUM, "What is 2 plus 5?", "What is 4 plus 2?")]
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in asked]
    assert max(cached[:2]) < 10 and cached[2] > 100, "the second shows where prompts part"
    again = chat(server, [system, *message(SUM), asked[0].choices[0].message.model_dump(include={"role", "content"})])
    assert again.usage.prompt_tokens_details.cached_tokens >= cached[2]


@pytest.mark.parametrize(
    ("request_", "kind", "told"),
    [
        ({"model": "other"}, openai.NotFoundError, "available: demo-E2B, demo-half"),
        ({"messages": []}, openai.BadRequestError, "messages: List should have at least 1"),
        ({"messages": [{"role": "king", "content": "x"}]}, openai.BadRequestError, "role 'king'"),
        ({"temperature": -1}, openai.BadRequestError, "temperature must be"),
        ({"n": 99}, openai.BadRequestError, "less than or equal to 16"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens must be"),
        ({"extra_body": {"best": 3}}, openai.BadRequestError, "best is no field of this request"),
        ({"logit_bias": {"99999999": 1}}, openai.BadRequestError, "the largest id is"),
        ({"response_format": {"type": "json_schema"}}, openai.BadRequestError, "needs the field json_schema"),
        ({"tool_choice": "required"}, openai.BadRequestError, "tools is empty"),
        ({"messages": message("x", image("data:image/png;base64,AAAA"))}, openai.BadRequestError, "image"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "king"}}}},
            openai.BadRequestError,
            "This JSON schema is not supported",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_openais(server, request_, kind, told, stream):
    with pytest.raises(kind, match=told) as caught:
        chat(server, **({"messages": message(SUM), "model": E2B, "stream": stream} | request_))
    assert {"message", "type", "code", "param"} <= {*caught.value.body}
