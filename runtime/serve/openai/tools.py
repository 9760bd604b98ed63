"""Tool calls. Gemma 3n has no special tokens for them: tools are described in the system prompt, and a call is JSON
with a name and arguments."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gemma3n_onnx.runtime.errors import PromptError
from gemma3n_onnx.runtime.serve.json_schema import embed

INSTRUCTIONS = """\
You can call these functions, given as JSON schemas:
{functions}
To call one, answer with nothing but JSON of this form: {{"name": "the function", "arguments": {{...}}}}"""
RESULT = "Result of {name}: {content}"
_FENCED = re.compile(r"```(?:json|tool_code|tool_call)?\s*(.*?)\s*```", re.DOTALL)


class Function(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool | None = None


class Tool(BaseModel):
    type: Literal["function"]
    function: Function


class FunctionName(BaseModel):
    name: str


class NamedTool(BaseModel):
    type: Literal["function"]
    function: FunctionName


def described(tools: Sequence[Tool]) -> str:
    functions = [tool.function.model_dump(exclude={"strict"}) for tool in tools]
    return INSTRUCTIONS.format(functions="\n".join(json.dumps(function) for function in functions))


def select_tools(tools: Sequence[Tool], choice: str | NamedTool) -> list[Tool]:
    """Tools that the model may call. Raises PromptError if the choice names an unknown tool."""
    if isinstance(choice, NamedTool):
        named = [tool for tool in tools if tool.function.name == choice.function.name]
        if not named:
            raise PromptError(f"tool_choice names {choice.function.name!r}, which tools does not define; add it.")
        return named
    if choice == "required" and not tools:
        raise PromptError("tool_choice is 'required', but tools is empty; add a tool.")
    return [] if choice == "none" else list(tools)


def schema_of(tools: Sequence[Tool]) -> dict[str, Any]:
    """JSON schema of a call of one of the tools."""
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "arguments": _arguments(tool.function)},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in tools
        ]
    }


def _arguments(function: Function) -> dict[str, Any]:
    """Arguments are always an object, whatever else the parameters allow."""
    return {"type": "object", "allOf": [embed(function.parameters, f"tool:{function.name}")]}


def may_be_tool_calls(text: str) -> bool:
    """Whether text with this beginning may still become a tool call."""
    start = text.lstrip()
    return not start or start[0] in "{[" or "```".startswith(start[:3])


def parse_tool_calls(text: str, tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form; empty unless the whole answer consists of calls."""
    names = {tool.function.name for tool in tools}
    text = text.strip()
    if fenced := _FENCED.fullmatch(text):
        text = fenced[1]
    try:
        found = json.loads(text)
    except ValueError:
        return []
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(_is_call(call, names) for call in calls):
        return []
    return [
        {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call["name"], "arguments": json.dumps(call.get("arguments", {}))},
        }
        for call in calls
    ]


def _is_call(call: Any, names: set[str]) -> bool:
    return isinstance(call, dict) and call.get("name") in names and isinstance(call.get("arguments", {}), dict)


def to_plain_messages(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Moves tools into the system prompt, and turns calls and results into text.

    Raises:
        PromptError: a call or a result does not have OpenAI's form.
    """
    made: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role == "assistant" and message.get("tool_calls"):
            calls = [_call_of(call, index) for call in message["tool_calls"]]
            names |= {str(call.get("id")): call["function"]["name"] for call in message["tool_calls"]}
            _add(made, "assistant", "\n".join([*([content] if content else []), *calls]))
        elif role == "tool":
            name = names.get(str(message.get("tool_call_id")))
            if name is None:
                raise PromptError(
                    f"Message {index} is a tool result, but no earlier message makes this call; add that message."
                )
            _add(made, "user", RESULT.format(name=name, content=_text_of(content, index)))
        elif role == "user" and isinstance(content, str) and index and messages[index - 1].get("role") == "tool":
            _add(made, "user", content)
        else:
            made.append(dict(message))
    return _with_system(made, described(tools)) if tools else made


def _add(made: list[dict[str, Any]], role: str, text: str) -> None:
    """Adds a message, or extends the last one if it has the same role: roles must alternate."""
    if made and made[-1]["role"] == role and isinstance(made[-1]["content"], str):
        made[-1]["content"] += f"\n{text}"
    else:
        made.append({"role": role, "content": text})


def _call_of(call: Any, index: int) -> str:
    try:
        function = call["function"]
        return json.dumps({"name": function["name"], "arguments": json.loads(function["arguments"])})
    except (TypeError, KeyError, ValueError) as error:
        raise PromptError(
            f"A tool call in message {index} needs a function with a name and arguments as JSON; add them."
        ) from error


def _text_of(content: Any, index: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(part["text"] for part in content)
    raise PromptError(f"The tool result in message {index} is not text; send its content as text.")


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    if messages and messages[0].get("role") in ("system", "developer"):
        first = messages[0]
        return [{**first, "content": f"{_text_of(first.get('content'), 0)}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
