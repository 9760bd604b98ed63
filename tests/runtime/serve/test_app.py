"""Errors, limits, keys, metrics and disconnecting clients."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from gemma3n_onnx.runtime.serve.app import Access
from gemma3n_onnx.runtime.serve.model_pool import ServeOptions
from serving import E2B, LONG_ANSWER, SUM, chat, eventually, message, serving


def test_paths_and_methods_that_are_not_there(server):
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405)):
        found = httpx.request(method, server.url + path)
        assert found.status_code == status and path in found.json()["error"]["message"]
    found = httpx.post(f"{server.url}/v1/chat/completions", content=b"{")
    assert found.status_code == 400 and "error" in found.json()


def test_health_and_metrics(server):
    chat(server, message(SUM))
    assert E2B in httpx.get(f"{server.url}/health").json()["loaded"]
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    of_model = 'gemma3n_new_tokens_total{model="demo-E2B"}'
    made = next(float(line.split()[-1]) for line in lines if line.startswith(of_model))
    assert made > 3 and any(line.startswith("gemma3n_first_token_seconds_count") for line in lines)


def test_a_client_that_goes_stops_its_answer(server):
    worker = server.pool.loaded[E2B].worker
    before = worker.counts.cancelled
    stream = chat(server, message(LONG_ANSWER), stream=True, logit_bias={"106": -100, "1": -100}, max_tokens=900)
    for _ in zip(range(3), stream):
        pass
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        chat(server, message(LONG_ANSWER), logit_bias={"106": -100, "1": -100}, max_tokens=900, timeout=0.3)
    eventually(lambda: worker.counts.cancelled == before + 2 and worker.running == 0)
    eventually(lambda: server.pool.loaded[E2B].users == 0)


def test_many_at_once_answer_as_one(server, model):
    asked = [f"What is {a} plus {b}?" for a in range(1, 7) for b in range(1, 7)]
    with ThreadPoolExecutor(16) as pool:
        answers = [*pool.map(lambda text: chat(server, message(text)).choices[0].message.content, asked)]
    assert answers == [model.generate(message(text)).text for text in asked]


def test_the_key_is_asked_for(demo_artifact):
    with serving([demo_artifact("E2B")], access=Access(api_key="secret")) as running:
        assert [of.id for of in running.client.models.list()] == [E2B]
        stranger = openai.OpenAI(base_url=f"{running.url}/v1", api_key="guess", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        assert httpx.get(f"{running.url}/health").status_code == 200


def test_limits_of_body_time_and_queue(demo_artifact):
    options = ServeOptions(rows=1, context=1024, queue=1)
    with serving([demo_artifact("E2B")], options, body_bytes=2000, seconds=0.5) as running:
        endless = {"logit_bias": {"106": -100, "1": -100}, "max_tokens": 900}
        with pytest.raises(openai.APIStatusError, match="larger than 2,000 bytes") as caught:
            chat(running, message("x" * 3000))
        assert caught.value.status_code == 413
        with pytest.raises(openai.APIStatusError, match="longer than this server allows") as caught:
            chat(running, message(LONG_ANSWER), **endless)
        assert caught.value.status_code == 504
        assert len(chat(running, message(SUM), n=2).choices) == 2, "one runs, one waits"
        with pytest.raises(openai.BadRequestError, match="3 answers, but this server takes at most 2 at once"):
            chat(running, message(SUM), n=3)
        with ThreadPoolExecutor(8) as pool:
            waits = [pool.submit(chat, running, message(LONG_ANSWER), **endless) for _ in range(8)]
            errors = [wait.exception() for wait in waits]
        assert {type(error) for error in errors} == {openai.RateLimitError, openai.InternalServerError}
        full = [str(error) for error in errors if isinstance(error, openai.RateLimitError)]
        assert all("queue of this model is full" in message for message in full)
