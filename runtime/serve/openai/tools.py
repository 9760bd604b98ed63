"""Tool calls. Gemma 3n has no special tokens for them: tools are described in the system prompt, and a call is JSON
with a name and arguments. A checkpoint whose chat template reads tools is given them as they are."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from gemma3n_onnx.runtime.constraints.json_schema import embed
from gemma3n_onnx.runtime.errors import PromptError
from gemma3n_onnx.runtime.serve.json_body import parse_json

from .requests import ApiModel

INSTRUCTIONS = """\
You can call these functions, given as JSON schemas:
{functions}
To call one, answer with nothing but JSON of this form: {{"name": "the function", "arguments": {{...}}}}"""
RESULT = "Result of {name}: "
MOST_CALLS = 8
_FENCED = re.compile(r"```(?:json|tool_code|tool_call)?\s*(.*?)\s*```", re.DOTALL)
# How the grammar begins a forced call.
_BEGUN = re.compile(r'\[?\{"name":("(?:[^"\\]|\\.)*"),"arguments":')


class Function(ApiModel):
    model_config = ConfigDict(extra="ignore")

    name: str
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})


class Tool(ApiModel):
    """Also in the flat form of the Responses API."""

    model_config = ConfigDict(extra="ignore")

    function: Function

    @model_validator(mode="before")
    @classmethod
    def _from_either_form(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            if (data.get("type") or "function") != "function":
                raise ValueError(f"a tool of type {data['type']!r} is not supported; use functions")
            if data.get("function") is None:
                return {"function": {key: value for key, value in data.items() if key != "type"}}
        return data


@dataclass(frozen=True)
class CallableTools:
    """Tools that the model may call, and whether it must."""

    tools: tuple[Tool, ...] = ()
    forced: bool = False
    parallel: bool = False


NO_TOOLS = CallableTools()


def select_tools(tools: Sequence[Tool], choice: Any, parallel: bool = False) -> CallableTools:
    """What `tool_choice` makes of the tools: none, auto, required or any, the name of one, or some allowed ones.

    Raises:
        PromptError: the choice has another form, or names an unknown tool.
    """
    match choice:
        case "none":
            return CallableTools()
        case "auto" | None:
            return CallableTools(tuple(tools), False, parallel)
        case "required" | "any":
            if not tools:
                raise PromptError(f"tool_choice is {choice!r}, but tools is empty; add a tool.")
            return CallableTools(tuple(tools), True, parallel)
        case {"type": "allowed_tools", "allowed_tools": {"tools": [*allowed], **rest}}:
            return _allowed(tools, allowed, str(rest.get("mode", "auto")), parallel)
        case {"type": "allowed_tools", "tools": [*allowed], **rest}:
            return _allowed(tools, allowed, str(rest.get("mode", "auto")), parallel)
        case {"function": {"name": str(name)}} | {"name": str(name)}:
            return CallableTools((_named(tools, name),), True, parallel)
    raise PromptError("tool_choice must be none, auto, required, the name of a function, or allowed_tools.")


def _allowed(tools: Sequence[Tool], allowed: Sequence[Any], mode: str, parallel: bool) -> CallableTools:
    names = [_name_in(each) for each in allowed]
    return CallableTools(tuple(_named(tools, name) for name in names), mode == "required", parallel)


def _name_in(tool: Any) -> Any:
    match tool:
        case {"function": {"name": name}} | {"name": name}:
            return name
    return tool


def _named(tools: Sequence[Tool], name: Any) -> Tool:
    for tool in tools:
        if tool.function.name == name:
            return tool
    raise PromptError(f"tool_choice names {name!r}, which tools does not define; add it.")


def described(tools: Sequence[Tool]) -> str:
    return INSTRUCTIONS.format(functions="\n".join(json.dumps(tool.function.model_dump()) for tool in tools))


def schema_of(tools: Sequence[Tool], parallel: bool = False) -> dict[str, Any]:
    """JSON schema of a call of one of the tools, or with `parallel` also of a list of them."""
    call = {
        "anyOf": [
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "arguments": _arguments_schema(tool.function)},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in tools
        ]
    }
    if not parallel:
        return call
    return {"anyOf": [call, {"type": "array", "items": call, "minItems": 1, "maxItems": MOST_CALLS}]}


def _arguments_schema(function: Function) -> dict[str, Any]:
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
    return [_call(call["name"], json.dumps(call.get("arguments", {}), ensure_ascii=False)) for call in calls]


def parse_cut_call(text: str) -> list[dict[str, Any]]:
    """The first call of a forced answer that was cut off, with as much of its arguments as there is."""
    begun = _BEGUN.match(text)
    return [_call(json.loads(begun[1]), text[begun.end() :])] if begun else []


def _call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


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
        calls = calls_of(message, index)
        if calls:
            names |= {call_id: name for call_id, name, _ in calls}
            written = [{"name": name, "arguments": arguments} for _, name, arguments in calls]
            call = json.dumps(written if len(written) > 1 else written[0])
            made.append({"role": "assistant", "content": "\n".join([*_texts_of(message.get("content")), call])})
        elif message.get("role") in ("tool", "function"):
            made.append({"role": "user", "content": _result(message, index, names)})
        else:
            made.append(dict(message))
    return _with_system(made, described(tools)) if tools else made


def to_template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages for a template that reads tools: arguments of calls as objects. Errors as of `to_plain_messages`."""
    made = []
    for index, message in enumerate(messages):
        calls = [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for call_id, name, arguments in calls_of(message, index)
        ]
        role = "tool" if message.get("role") == "function" else message.get("role")
        made.append({**message, "role": role, **({"tool_calls": calls} if calls else {})})
    return made


def calls_of(message: Mapping[str, Any], index: int) -> list[tuple[str, str, Any]]:
    """Id, name and arguments of the calls of an assistant's message, also in the legacy form."""
    if message.get("role") != "assistant":
        return []
    calls = message.get("tool_calls") or []
    if not calls and (legacy := message.get("function_call")):
        calls = [{"id": "", "function": legacy}]
    try:
        return [
            (str(call.get("id", "")), call["function"]["name"], _arguments(call["function"].get("arguments"), index))
            for call in calls
        ]
    except (AttributeError, TypeError, KeyError) as error:
        raise PromptError(
            f"A tool call in message {index} needs a function with a name and arguments as JSON; add them."
        ) from error


def _arguments(written: Any, index: int) -> Any:
    if isinstance(written, str) and written.strip():
        return parse_json(written.encode(), f"The field arguments of message {index}")
    return written or {}


def _result(message: Mapping[str, Any], index: int, names: Mapping[str, str]) -> str | list[dict[str, Any]]:
    name = names.get(str(message.get("tool_call_id"))) or message.get("name")
    if not isinstance(name, str):
        raise PromptError(
            f"Message {index} is a tool result, but no earlier message makes this call; add that message."
        )
    head, content = RESULT.format(name=name), message.get("content")
    if content is None or isinstance(content, str):
        return head + (content or "")
    if not isinstance(content, list):
        raise PromptError(f"The tool result in message {index} is neither text nor a list of parts; send one of them.")
    if content and isinstance(content[0], Mapping) and content[0].get("type") == "text":
        first = {**content[0], "text": f"{head}{content[0].get('text')}"}
        return [first, *content[1:]]
    return [{"type": "text", "text": head}, *content]


def _texts_of(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content] if content else []
    return [part["text"] for part in content or [] if isinstance(part, Mapping) and isinstance(part.get("text"), str)]


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    if messages and messages[0].get("role") in ("system", "developer"):
        first = "\n\n".join([*_texts_of(messages[0].get("content")), text])
        return [{**messages[0], "content": first}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
