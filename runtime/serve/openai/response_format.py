"""The constraint that a request puts on its answer, in the forms of several servers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, Field

from gemma3n_onnx.runtime.errors import OptionError
from gemma3n_onnx.runtime.serve.answering import ParsedRequest
from gemma3n_onnx.runtime.serve.grammar import ANY_OBJECT, Constraint, Grammars

from .requests import ApiModel, SamplingRequest

_Parsed = TypeVar("_Parsed", bound=ParsedRequest)
Schema = dict[str, Any] | bool


class JsonSchema(ApiModel):
    """`schema` of the request is `schema_` here, which pydantic keeps for itself."""

    model_config = ConfigDict(extra="ignore")

    schema_: Schema = Field(alias="schema")


class ResponseFormat(ApiModel):
    """OpenAI's; `schema` beside json_object is llama.cpp's, `value` TGI's."""

    type: Literal["text", "json_object", "json_schema", "json", "regex", "grammar"]
    json_schema: JsonSchema | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    value: Any = None
    pattern: str | None = None
    grammar: str | None = None


class StructuredOutputs(ApiModel):
    """vLLM's."""

    json_: Schema | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class ConstrainedRequest(SamplingRequest):
    """`guided_*` are vLLM's older fields, `grammar` and `json_schema` are llama.cpp's."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    grammar: str | None = None
    json_schema: Schema | None = None


def constraint_of(request: ConstrainedRequest, grammars: Grammars) -> Constraint | None:
    """Raises OptionError for a constraint that cannot be followed, and for two in one request."""
    wanted = [each for each in (_of_format(request.response_format), _of_vllm(request), _of_llamacpp(request)) if each]
    if len(wanted) > 1:
        raise OptionError("The request constrains its answer twice; leave one of the constraints out.")
    if not wanted:
        return None
    ((kind, value),) = wanted
    match kind:
        case "json":
            return grammars.json_of(value)
        case "regex":
            return grammars.regex_of(value)
        case "choice":
            return grammars.choice_of(value)
        case _:
            return grammars.lark_of(value)


def constrained(parsed: _Parsed, constraint: Constraint | None) -> _Parsed:
    """The request with its answers held to a constraint."""
    if constraint is None:
        return parsed
    options = replace(parsed.options, logits_processor=constraint.processor)
    return replace(parsed, options=options, check=constraint.check)


_Wanted = tuple[str, Any] | None


def _of_format(wanted: ResponseFormat | None) -> _Wanted:
    if wanted is None or wanted.type == "text":
        return None
    match wanted.type:
        case "json_object":
            schema = wanted.schema_ if wanted.json_schema is None else wanted.json_schema.schema_
            return "json", ANY_OBJECT if schema is None else schema
        case "json_schema":
            schema = wanted.schema_ if wanted.json_schema is None else wanted.json_schema.schema_
            return "json", _given("json_schema", schema)
        case "json":
            return "json", _given("value", wanted.value)
        case "regex":
            return "regex", _given("pattern", wanted.pattern if wanted.value is None else wanted.value)
        case _:
            return "grammar", _given("grammar", wanted.grammar if wanted.value is None else wanted.value)


def _given(field: str, value: Any) -> Any:
    if value is None:
        raise OptionError(f"This type of response_format needs the field {field}; add it.")
    return value


def _of_vllm(request: ConstrainedRequest) -> _Wanted:
    outputs = request.structured_outputs or StructuredOutputs()
    return _only(
        {
            "json": _json_value(_one(outputs.json_, request.guided_json)),
            "regex": _one(outputs.regex, request.guided_regex),
            "choice": _one(outputs.choice, request.guided_choice),
            "grammar": _one(outputs.grammar, request.guided_grammar),
        },
        ANY_OBJECT if outputs.json_object else None,
    )


def _of_llamacpp(request: ConstrainedRequest) -> _Wanted:
    return _only({"json": request.json_schema, "grammar": request.grammar or None}, None)


def _only(given: Mapping[str, Any], default: Any) -> _Wanted:
    found = [(kind, value) for kind, value in given.items() if value is not None]
    if len(found) > 1:
        raise OptionError("The request constrains its answer twice; leave one of the constraints out.")
    return found[0] if found else ("json", default) if default is not None else None


def _one(newer: Any, older: Any) -> Any:
    if newer is not None and older is not None:
        raise OptionError("The request constrains its answer twice; leave one of the constraints out.")
    return older if newer is None else newer


def _json_value(schema: Schema | str | None) -> Any:
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except ValueError as error:
        raise OptionError("The JSON schema is a string that is not JSON; send the schema itself.") from error
