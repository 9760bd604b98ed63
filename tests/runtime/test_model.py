"""What Python callers of a loaded model get, beside the answers themselves."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import pytest

from gemma3n_onnx import ClosedError, OnnxGemma3n, OptionError, PackageMissingError, PromptError
from gemma3n_onnx.runtime.engine.ort import Session

PROMPTS = ["Hello", "One, two,", "Red, green,", "Hello there, how"]
LENGTH = 12


@pytest.fixture(scope="module")
def model(small_artifact: Path) -> OnnxGemma3n:
    return OnnxGemma3n.from_pretrained(small_artifact, prefix_cache_size=2)


@pytest.fixture(scope="module")
def alone(model: OnnxGemma3n) -> dict[str, str]:
    """The answer to each prompt by itself."""
    return {prompt: model.generate(prompt, max_new_tokens=LENGTH).text for prompt in PROMPTS}


def test_a_model_says_what_it_is(model: OnnxGemma3n, small_artifact: Path) -> None:
    assert repr(model) == f"<OnnxGemma3n {str(small_artifact)!r}: whole of small, fp32, text, on cpu>"


def test_a_stream_has_no_finish_reason_before_its_end(model: OnnxGemma3n, alone: dict[str, str]) -> None:
    stream = model.stream("Hello", max_new_tokens=LENGTH)
    assert (stream.result.text, stream.result.finish_reason) == ("", None)
    first = next(stream)
    assert (stream.result.text, stream.result.finish_reason) == (first, None)
    assert first + "".join(stream) == alone["Hello"]
    assert stream.result.finish_reason == "length"
    closed = model.stream("Hello", max_new_tokens=LENGTH)
    next(closed)
    closed.close()
    assert closed.result.finish_reason is None


def test_a_closed_model_refuses_and_is_freed(small_artifact: Path) -> None:
    with OnnxGemma3n.from_pretrained(small_artifact) as model:
        chat = model.chat()
        stream = model.stream("Hello", max_new_tokens=LENGTH)
        next(stream)
        session: weakref.ref[Session] = weakref.ref(model.engine._session)
    calls = (
        lambda: model.generate("Hello"),
        lambda: model.stream("Hello"),
        lambda: model.log_likelihood("Hello", " you"),
        model.chat,
        lambda: chat.send("Hello"),
        lambda: asyncio.run(model.agenerate("Hello")),
    )
    for call in calls:
        with pytest.raises(ClosedError, match="load it again"):
            call()
    with pytest.raises(ClosedError, match="load it again"):
        next(stream)
    model.close()
    del stream
    gc.collect()
    assert session() is None


def test_threads_take_turns(model: OnnxGemma3n, alone: dict[str, str]) -> None:
    asked = PROMPTS * 3
    running, most, steps = 0, 0, model.engine._run

    def counted(*arguments: object, **options: object) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        steps(*arguments, **options)  # type: ignore[arg-type]
        running -= 1

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as threads:
        patch.setattr(model.engine, "_run", counted)
        found = [*threads.map(lambda prompt: model.generate(prompt, max_new_tokens=LENGTH).text, asked)]
    assert found == [alone[prompt] for prompt in asked]
    assert most == 1


def test_asynchronous_answers_are_the_same(model: OnnxGemma3n, alone: dict[str, str]) -> None:
    async def ask() -> None:
        one, batch = model.agenerate("Hello", max_new_tokens=LENGTH), model.agenerate(PROMPTS, max_new_tokens=LENGTH)
        found, several = await asyncio.gather(one, batch)
        assert found.text == alone["Hello"]
        assert [answer.text for answer in several] == [alone[prompt] for prompt in PROMPTS]
        stream = model.astream("Hello", max_new_tokens=LENGTH)
        with pytest.raises(RuntimeError, match="not begun"):
            _ = stream.result
        assert "".join([piece async for piece in stream]) == alone["Hello"] == stream.result.text
        assert stream.result.finish_reason == "length"
        ended = model.astream("Hello", max_new_tokens=LENGTH)
        assert await anext(ended)
        await ended.aclose()
        assert [piece async for piece in ended] == [] and ended.result.finish_reason is None

    asyncio.run(ask())


def test_asynchronous_errors_are_raised_where_they_are_awaited(model: OnnxGemma3n) -> None:
    async def ask() -> None:
        with pytest.raises(PromptError, match="empty"):
            await model.agenerate("")
        with pytest.raises(OptionError, match="temperature"):
            await anext(model.astream("Hello", temperature=-1))
        with pytest.raises(PromptError, match="agenerate for a batch"):
            model.astream(["Hello", "you"])  # type: ignore[arg-type]

    asyncio.run(ask())


def test_a_cancelled_task_ends_generation(model: OnnxGemma3n) -> None:
    stepped, steps = threading.Event(), 0
    run = model.engine._run

    def counted(*arguments: object, **options: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            stepped.set()
        run(*arguments, **options)  # type: ignore[arg-type]

    async def ask() -> None:
        task = asyncio.ensure_future(model.agenerate("Hello", max_new_tokens=200))
        await asyncio.to_thread(stepped.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.engine, "_run", counted)
        asyncio.run(ask())  # waits for its threads
    assert 5 <= steps < 100


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_stream_is_closed_while_a_step_runs(model: OnnxGemma3n, cancelled: bool) -> None:
    begun, go, run = threading.Event(), threading.Event(), model.engine._run

    def held(*arguments: object, **options: object) -> None:
        begun.set()
        go.wait()
        run(*arguments, **options)  # type: ignore[arg-type]

    async def ask() -> None:
        stream = model.astream("Hello", max_new_tokens=200)
        step = asyncio.ensure_future(anext(stream, None))
        await asyncio.to_thread(begun.wait)
        if cancelled:
            step.cancel()
        closing = asyncio.ensure_future(stream.aclose())
        await asyncio.sleep(0.02)
        waits = not closing.done()
        go.set()
        await closing
        assert waits, "for the end of the step"
        with pytest.raises(asyncio.CancelledError) if cancelled else contextlib.nullcontext():
            await step
        assert [piece async for piece in stream] == [] and stream.result.finish_reason is None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.engine, "_run", held)
        asyncio.run(ask())


def test_logprobs_have_the_texts_of_tokens(model: OnnxGemma3n) -> None:
    result = model.generate("Hello", max_new_tokens=LENGTH, logprobs=3)
    assert result.logprobs is not None
    scored = (*result.logprobs, *model.log_likelihood("Hello", " you").tokens)
    assert [token.token_id for token in result.logprobs] == list(result.token_ids)
    for token in (*scored, *(top for each in scored for top in each.top)):
        byte = model.tokenizer.bytes_by_id.get(token.token_id)
        wanted = model.tokenizer.decode([token.token_id], skip_special=False) if byte is None else f"\\x{byte:02x}"
        assert token.text == wanted
    assert all(len(token.top) == 3 for token in result.logprobs)


SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}, "certain": {"type": "boolean"}},
    "required": ["sum", "certain"],
    "additionalProperties": False,
}


def test_an_answer_is_held_to_a_constraint(model: OnnxGemma3n) -> None:
    asked, short = [{"role": "user", "content": "Hello"}], {"max_new_tokens": 64}
    jsonschema.validate(json.loads(model.generate(asked, json_schema=SCHEMA, **short).text), SCHEMA)
    assert re.fullmatch("[a-f]{3} or [0-9]", model.generate("Hello", regex="[a-f]{3} or [0-9]", **short).text)
    batch = model.generate(PROMPTS, choice=["yes", "no"], **short)
    assert {answer.text for answer in batch} <= {"yes", "no"}
    assert re.fullmatch("a[0-9]b", model.generate("Hello", grammar='root ::= "a" [0-9] "b"', **short).text)
    assert model.chat().send("Hello", choice=["maybe"], **short).text == "maybe"
    assert "".join(model.stream("Hello", choice=["maybe"], **short)) == "maybe"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"regex": "a", "choice": ["b"]}, "regex and choice both constrain the answer"),
        ({"regex": "a", "logits_processor": object}, "regex and logits_processor both constrain"),
        ({"json_schema": {"type": "integre"}}, "integre"),
        ({"json_schema": "{}"}, "json_schema must be a dict, true or false, not '{}'"),
        ({"regex": "("}, "regular expression is not supported"),
        ({"choice": []}, "between 1 and"),
        ({"choice": "yes"}, "choice must be a list, not 'yes'"),
        ({"grammar": "root ::= nothing"}, "grammar"),
    ],
)
def test_a_constraint_that_cannot_be_followed(model: OnnxGemma3n, options: dict, says: str) -> None:
    with pytest.raises(OptionError, match=re.escape(says)):
        model.generate("Hello", **options)


def test_a_constraint_without_its_package(small_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gemma3n_onnx.runtime.constraints.grammar", raising=False)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(PackageMissingError, match=re.escape("gemma3n-onnx[constraints]")):
        OnnxGemma3n.from_pretrained(small_artifact).generate("Hello", regex="a")
