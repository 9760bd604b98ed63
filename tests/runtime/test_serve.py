"""The server, asked by OpenAI's own client."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
import uvicorn

from gemma3n_onnx.runtime import ArtifactError, FetchPolicy, OnnxGemma3n, OptionError
from gemma3n_onnx.runtime.artifact import load_manifest
from gemma3n_onnx.runtime.serve.app import create_app
from gemma3n_onnx.runtime.serve.model_pool import ModelPool, ServeOptions, artifacts_in, estimated_bytes
from gemma3n_onnx.runtime.serve.run import run_app
from gemma3n_onnx.runtime.serve.service import Limits

DEMO = Path(__file__).parents[2] / "demo"
E2B, HALF = "demo-E2B", "demo-half"
SUM = "What is 3 plus 4?"
LONG_ANSWER = "Count from 1 to 40."
SCHEMA = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
    },
    "required": ["color", "count", "names"],
    "additionalProperties": False,
}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "The sum of two numbers.",
        "parameters": {
            "type": "object",
            "properties": {name: {"type": "integer", "minimum": 0, "maximum": 99} for name in "ab"},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


def message(text: str, *parts: dict) -> list[dict]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}]


@contextlib.contextmanager
def serving(folders: list[Path], options: ServeOptions | None = None, api_key: str | None = None, **limits):
    """The application on a port of its own: `url`, `client` and `pool`."""
    fetch = FetchPolicy(allow_private=True, files_under=DEMO)
    pool = ModelPool(folders, options or ServeOptions(rows=4, context=1024), {"fetch": fetch, "threads": 1})
    app = create_app(pool, Limits(**limits), api_key)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=api_key or "none", max_retries=0)
    try:
        yield SimpleNamespace(url=url, client=client, pool=pool)
    finally:
        client.close()
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server(demo_artifact):
    with serving([demo_artifact("E2B"), demo_artifact("half")]) as running:
        yield running


@pytest.fixture(scope="module")
def model(demo_artifact) -> OnnxGemma3n:
    return OnnxGemma3n.from_pretrained(demo_artifact("E2B"))


def chat(server, messages, model: str = E2B, **options):
    return server.client.chat.completions.create(model=model, messages=messages, **({"temperature": 0} | options))


def eventually(condition) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("it never came to be")


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


def image(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


@pytest.mark.parametrize("source", ["picture.png", str(DEMO / "picture.png"), data_url(DEMO / "picture.png")])
def test_a_picture_by_path_and_as_data(server, source):
    answer = chat(server, message("What is in the picture?", image(source)))
    assert answer.choices[0].message.content == "A red circle, a yellow star and a blue square."


@pytest.mark.parametrize("source", ["/etc/hostname", "../README.md", "file:///etc/hostname"])
def test_files_elsewhere_are_not_read(server, source):
    with pytest.raises(openai.BadRequestError):
        chat(server, message("What is in the picture?", image(source)))


def test_a_sound(server):
    data = base64.b64encode((DEMO / "sound.wav").read_bytes()).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    assert chat(server, message("What do you hear?", part)).choices[0].message.content == "Three high beeps."


def test_a_transcription(server):
    with (DEMO / "sound.wav").open("rb") as file:
        made = server.client.audio.transcriptions.create(model=E2B, file=file, prompt="What do you hear?")
    assert made.text == "Three high beeps."
    with (DEMO / "sound.wav").open("rb") as file:
        made = server.client.audio.transcriptions.create(
            model=E2B, file=file, prompt="What do you hear?", response_format="text"
        )
    assert made == "Three high beeps."


def test_a_request_chooses_its_slice(server):
    for name in (E2B, HALF, E2B):
        answer = chat(server, message(SUM), model=name)
        assert (answer.model, answer.choices[0].message.content) == (name, "3 plus 4 is 7.")
    assert {*server.pool.loaded} == {E2B, HALF}
    listed = {model.id: model for model in server.client.models.list()}
    assert {*listed} == {E2B, HALF} and listed[HALF].slice == "half"
    assert server.client.models.retrieve(E2B).id == E2B


def test_a_hundred_answers_of_a_schema(server):
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}

    def one(seed: int) -> str:
        answer = chat(server, message("Describe a thing."), response_format=wanted, temperature=1.5, seed=seed)
        assert answer.choices[0].finish_reason == "stop"
        return answer.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        answers = [*pool.map(one, range(100))]
    for text in answers:
        found = json.loads(text)
        assert found.keys() == {"color", "count", "names"} and found["color"] in ("red", "green", "blue")
        assert 0 <= found["count"] <= 99 and len(found["names"]) <= 3
        assert all(len(name) <= 8 for name in found["names"])
    assert len({*answers}) > 20


def test_any_json_object(server):
    options = {"response_format": {"type": "json_object"}, "max_tokens": 200, "temperature": 1.0}
    answers = [chat(server, message("Say something."), **options, seed=seed).choices[0] for seed in range(4)]
    assert all(answer.message.content.startswith("{") for answer in answers)
    ended = [json.loads(answer.message.content) for answer in answers if answer.finish_reason == "stop"]
    assert ended, "all were cut at 200 tokens"
    assert all(isinstance(found, dict) for found in ended)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_must_be(server, choice, stream):
    answer = chat(server, message(SUM), tools=[ADD], tool_choice=choice, stream=stream)
    if stream:
        choices = [choice for chunk in answer for choice in chunk.choices]
        (call,) = [call for choice in choices for call in choice.delta.tool_calls or ()]
        assert choices[-1].finish_reason == "tool_calls"
        assert not any(choice.delta.content for choice in choices)
    else:
        (call,) = answer.choices[0].message.tool_calls
        assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
    assert call.function.name == "add" and {*json.loads(call.function.arguments)} == {"a", "b"}


def test_a_conversation_with_a_call_and_its_result(server):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 3, "b": 4}'}}
    messages = [
        *message(SUM),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "7"},
    ]
    answer = chat(server, messages, tools=[ADD], max_tokens=20)
    assert answer.choices[0].message.content is not None
    with pytest.raises(openai.BadRequestError, match="no earlier message makes"):
        chat(server, [*message(SUM), {"role": "tool", "tool_call_id": "other", "content": "7"}])


def test_log_probabilities_are_the_models(server, model):
    wanted = model.generate(message(SUM), logprobs=3)
    for stream in (False, True):
        answer = chat(server, message(SUM), logprobs=True, top_logprobs=3, stream=stream)
        found = (
            [entry for chunk in answer for c in chunk.choices if c.logprobs for entry in c.logprobs.content]
            if stream
            else answer.choices[0].logprobs.content
        )
        assert len(found) == len(wanted.logprobs)
        for ours, theirs in zip(found, wanted.logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [top.logprob for top in ours.top_logprobs] == pytest.approx([p for _, p in theirs.top], abs=1e-3)
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


def test_a_completion(server, model):
    prompt = model.prompts.render(model.read(message(SUM), None)).removeprefix("<bos>")
    made = server.client.completions.create(model=E2B, prompt=prompt, temperature=0, logprobs=1)
    assert made.choices[0].text == "3 plus 4 is 7."
    assert len(made.choices[0].logprobs.tokens) == made.usage.completion_tokens
    pieces = server.client.completions.create(model=E2B, prompt=prompt, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == "3 plus 4 is 7."
    ids = [[2, 5, 6], [2, 7]]
    made = server.client.completions.create(model=E2B, prompt=ids, temperature=0, max_tokens=2, n=2)
    assert len(made.choices) == 4


def test_what_a_prompt_shares_with_an_earlier_one_is_not_run(server):
    system = {"role": "system", "content": "You are brief. " * 20}
    asked = [chat(server, [system, *message(text)]) for text in (SUM, "What is 2 plus 5?", "What is 4 plus 2?")]
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in asked]
    assert cached[:2] == [0, 0] and cached[2] > 100, "the second shows where prompts part"
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
        ({"max_tokens": 5000}, openai.BadRequestError, "shorten the prompt"),
        ({"extra_body": {"best": 3}}, openai.BadRequestError, "best: Extra inputs"),
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


def test_paths_and_methods_that_are_not_there(server):
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405)):
        found = httpx.request(method, server.url + path)
        assert found.status_code == status and path in found.json()["error"]["message"]
    found = httpx.post(f"{server.url}/v1/chat/completions", content=b"{")
    assert found.status_code == 400 and "error" in found.json()


def test_health_metrics_and_the_page(server):
    chat(server, message(SUM))
    assert E2B in httpx.get(f"{server.url}/health").json()["loaded"]
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    of_model = 'gemma3n_new_tokens_total{model="demo-E2B"}'
    made = next(float(line.split()[-1]) for line in lines if line.startswith(of_model))
    assert made > 3 and any(line.startswith("gemma3n_first_token_seconds_count") for line in lines)
    page = httpx.get(server.url).text
    assert "<textarea" in page and "http://" not in page and "https://" not in page


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
    with serving([demo_artifact("E2B")], api_key="secret") as running:
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
        with pytest.raises(openai.RateLimitError, match="queue of this model is full"):
            chat(running, message(SUM), n=3)
        with ThreadPoolExecutor(8) as pool:
            waits = [pool.submit(chat, running, message(LONG_ANSWER), **endless) for _ in range(8)]
            errors = [wait.exception() for wait in waits]
        assert {type(error) for error in errors} == {openai.RateLimitError, openai.InternalServerError}


def test_models_that_rest_make_room(demo_artifact):
    folders = [demo_artifact(name) for name in ("E2B", "half")]
    sizes = [estimated_bytes(load_manifest(folder), 1, 512) for folder in folders]
    options = ServeOptions(rows=1, context=512, memory_budget=max(sizes))
    engines: list[weakref.ref] = []
    with serving(folders, options) as running:
        for name in (E2B, HALF, E2B):
            assert chat(running, message(SUM), model=name).choices[0].message.content == "3 plus 4 is 7."
            assert [*running.pool.loaded] == [name]
            engines.append(weakref.ref(running.pool.loaded[name].model.engine))
        assert [engine() is None for engine in engines] == [True, True, False], "unloaded models stay in memory"
        endless = {"logit_bias": {"106": -100, "1": -100}, "max_tokens": 400}
        stream = chat(running, message(LONG_ANSWER), stream=True, **endless)
        next(stream)
        with pytest.raises(openai.RateLimitError, match="Every model in memory is in use"):
            chat(running, message(SUM), model=HALF)
        stream.close()


def test_what_cannot_be_served(demo_artifact, tmp_path):
    with pytest.raises(ArtifactError, match="No artifact to serve"):
        ModelPool([], ServeOptions(), {})
    with pytest.raises(ArtifactError, match="No such folder"):
        artifacts_in(tmp_path / "none")
    folder = demo_artifact("E2B")
    with pytest.raises(ArtifactError, match="same name"):
        ModelPool([folder, folder], ServeOptions(), {})
    assert folder in artifacts_in(folder.parent)
    with pytest.raises(OptionError, match="--rows is 0"):
        ServeOptions(rows=0)
    with pytest.raises(OptionError, match="Cannot listen on"):
        run_app(None, "192.0.2.1", 80)


def test_a_schemas_numbers_are_told_apart(server):
    """The mask follows the tokens: what comes is one of what may."""
    schema = {"type": "integer", "minimum": 10, "maximum": 12}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    answers = {
        chat(server, message("A number."), response_format=wanted, temperature=2.0, seed=seed)
        .choices[0]
        .message.content
        for seed in range(20)
    }
    assert answers <= {"10", "11", "12"} and len(answers) > 1
