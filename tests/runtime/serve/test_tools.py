"""Tool calls and their results."""

from __future__ import annotations

import json

import openai
import pytest

from serving import SUM, chat, message

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


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_must_be(server, choice, stream):
    answer = chat(server, message(SUM), tools=[ADD], tool_choice=choice, stream=stream)
    if stream:
        choices = [choice for chunk in answer for choice in chunk.choices]
        call, rest = [call for choice in choices for call in choice.delta.tool_calls or ()]
        assert (call.index, rest.index) == (0, 0) and call.id and not rest.id
        call.function.arguments += rest.function.arguments
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
