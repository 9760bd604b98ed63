"""/v1/responses, asked by OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from gemma3n_onnx.runtime.serve.openai.response_store import ResponseStore, UnknownResponseError
from serving import DEMO, E2B, SUM, data_url, eventually

ANSWER = "3 plus 4 is 7."
PARAMETERS = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["sum"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "add", "parameters": PARAMETERS, "strict": True}


def ask(server: Any, given: Any = SUM, **options: Any) -> Any:
    return server.client.responses.create(model=E2B, input=given, **({"temperature": 0} | options))


def test_text_and_usage(server: Any) -> None:
    response = ask(server)
    assert (response.output_text, response.status, response.model) == (ANSWER, "completed", E2B)
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    cut = ask(server, max_output_tokens=3)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"


def test_pictures_and_sounds_are_read(server: Any) -> None:
    parts = [
        {"type": "input_image", "image_url": data_url(DEMO / "picture.png"), "detail": "auto"},
        {"type": "input_text", "text": "What is in the picture?"},
    ]
    assert (
        ask(server, [{"role": "user", "content": parts}]).output_text
        == "A red circle, a yellow star and a blue square."
    )


def test_events_of_a_text(server: Any) -> None:
    events = [*ask(server, stream=True)]
    assert [event.sequence_number for event in events] == [*range(len(events))]
    kinds = [event.type for event in events]
    text = "response.output_text.delta"
    begin = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert [kind for kind in kinds if kind != text] == [f"response.{kind}" for kind in begin + end]
    assert "".join(event.delta for event in events if event.type == text) == ANSWER
    assert events[-1].response.output_text == ANSWER and events[-1].response.usage.output_tokens > 3
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {events[-1].response.output[0].id}


def test_log_probabilities_are_the_models(server: Any, model: Any) -> None:
    wanted = model.generate([{"role": "user", "content": SUM}], logprobs=3).logprobs
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 3}
    whole = ask(server, **asked).output[0].content[0]
    events = [*ask(server, stream=True, **asked)]
    streamed = [entry for event in events if event.type == "response.output_text.delta" for entry in event.logprobs]
    (done,) = [event for event in events if event.type == "response.output_text.done"]
    for found in (whole.logprobs, streamed, done.logprobs, events[-1].response.output[0].content[0].logprobs):
        assert "".join(entry.token for entry in found) == ANSWER
        for ours, theirs in zip(found, wanted[:-1], strict=True):  # the end token is not listed
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            likely = [top.logprob for top in theirs.top]
            assert [top.logprob for top in ours.top_logprobs] == pytest.approx(likely, abs=1e-3)
    assert ask(server).output[0].content[0].logprobs == []


def test_the_clients_helper_adds_the_events_up(server: Any) -> None:
    with server.client.responses.stream(model=E2B, input=SUM, temperature=0) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == ANSWER


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_and_its_result(server: Any, stream: bool) -> None:
    asked = [{"role": "user", "content": SUM}]
    response = ask(server, asked, tools=[TOOL], tool_choice="required", stream=stream)
    if stream:
        events = [*response]
        response = events[-1].response
        (arguments,) = [event.arguments for event in events if event.type == "response.function_call_arguments.done"]
        assert arguments == "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    (call,) = response.output
    assert (call.type, call.name, call.status) == ("function_call", "add", "completed")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "7"}
    whole = ask(server, [*asked, call.model_dump(), result], tools=[TOOL])
    kept = ask(server, [result], previous_response_id=response.id, tools=[TOOL])
    named = ask(server, [*asked, {"type": "item_reference", "id": call.id}, result], tools=[TOOL])
    assert whole.output_text == kept.output_text == named.output_text
    assert whole.usage.input_tokens == kept.usage.input_tokens == named.usage.input_tokens


def test_a_schema_is_followed(server: Any) -> None:
    wanted = {"format": {"type": "json_schema", "name": "sum", "schema": PARAMETERS, "strict": True}}
    response = ask(server, text=wanted)
    assert response.output_text.startswith('{"sum":') and response.status == "completed"


def test_a_conversation_goes_on(server: Any) -> None:
    first = ask(server, "My name is Ada.")
    second = ask(server, SUM, previous_response_id=first.id)
    alone = ask(
        server, [{"role": "user", "content": "My name is Ada."}, *first.output, {"role": "user", "content": SUM}]
    )
    assert second.usage.input_tokens == alone.usage.input_tokens and second.output_text == alone.output_text
    assert server.client.responses.retrieve(first.id).output_text == first.output_text
    with pytest.raises(openai.BadRequestError, match="not streamed again"):
        [*server.client.responses.retrieve(first.id, stream=True)]
    server.client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="not kept"):
        ask(server, SUM, previous_response_id=first.id)
    with pytest.raises(openai.NotFoundError, match="not kept"):
        server.client.responses.retrieve(ask(server, store=False).id)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "not supported"),
        ({"input": [{"type": "computer_call"}]}, "has type 'computer_call'"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "needs the field schema"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"top_logprobs": 3}, "top_logprobs needs 'message.output_text.logprobs' in include"),
        ({"input": []}, "at least 1"),
        ({"temperature": -1}, "temperature must be"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_openais(server: Any, fields: dict[str, Any], told: str, stream: bool) -> None:
    options = {"input": SUM, "stream": stream} | fields
    with pytest.raises(openai.BadRequestError, match=told):
        server.client.responses.create(model=E2B, **options)


def test_a_stream_that_fails_ends_with_an_error(server: Any) -> None:
    with pytest.raises(openai.APIError, match="more than the context"):
        [*ask(server, "word " * 3000, stream=True)]
    eventually(lambda: server.pool.loaded[E2B].users == 0)


def test_a_failure_on_the_way_is_an_event(server: Any) -> None:
    """No value matches this schema's `not`, which is checked after generation."""
    never = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 2, "not": {"type": "string"}}}}
    wanted = {"format": {"type": "json_schema", "name": "x", "schema": {**never, "required": ["a"]}}}
    body = {"model": E2B, "input": SUM, "text": wanted, "stream": True, "temperature": 0}
    blocks = httpx.post(f"{server.url}/v1/responses", json=body, timeout=60).text.strip().split("\n\n")
    events = [json.loads(block.split("data: ", 1)[1]) for block in blocks]
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    assert "not" in events[-2]["message"] and events[-1]["response"]["status"] == "failed"
    whole = httpx.post(f"{server.url}/v1/responses", json=body | {"stream": False}, timeout=60)
    assert whole.status_code == 422


@pytest.mark.parametrize("given", [[{"type": "item_reference"}], [{"role": "user", "content": 5}]])
def test_malformed_items_are_refused(server: Any, given: Any) -> None:
    assert httpx.post(f"{server.url}/v1/responses", json={"model": E2B, "input": given}).status_code in (400, 404)


def response(number: int, text: str) -> dict[str, Any]:
    return {"id": f"resp_{number}", "output": [{"id": f"msg_{number}", "text": text}]}


def test_the_store_forgets_what_was_used_longest_ago() -> None:
    store = ResponseStore(max_bytes=400)
    for number in range(3):
        store.keep(response(number, "x" * 60), [])
        store.response("resp_0")
    assert store.response("resp_0") and store.item("msg_0")["text"] == "x" * 60
    with pytest.raises(UnknownResponseError):
        store.response("resp_1")
    store.keep(response(9, "x" * 600), [])
    with pytest.raises(UnknownResponseError):
        store.response("resp_9")
