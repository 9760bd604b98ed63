"""The constraint that a request puts on its answer, in the forms of several servers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from pydantic import ConfigDict, Field

from gemma3n_onnx.runtime.constraints.grammar import ANY_OBJECT, Constraint, Grammars
from gemma3n_onnx.runtime.errors import OptionError
from gemma3n_onnx.runtime.serve.json_body import parse_json

from .requests import ApiModel, Items, SamplingRequest

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
    choice: Items[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class ConstrainedRequest(SamplingRequest):
    """`guided_*` are vLLM's older fields, `grammar` and `json_schema` are llama.cpp's."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: Items[str] | None = None
    guided_grammar: str | None = None
    grammar: str | None = None
    json_schema: Schema | None = None


def constraint_of(request: ConstrainedRequest, grammars: Grammars) -> Callable[[], Constraint] | None:
    """Makes the constraint of a request; None if it has none. Raises OptionError for two in one request."""
    wanted = _wanted(request)
    if len(wanted) > 1:
        raise OptionError("The request constrains its answer twice; leave one of the constraints out.")
    if not wanted:
        return None
    ((kind, value),) = wanted
    match kind:
        case "json":
            return partial(grammars.json_of, value)
        case "regex":
            return partial(grammars.regex_of, value)
        case "choice":
            return partial(grammars.choice_of, value)
        case _:
            return partial(grammars.lark_of, value)


def _wanted(request: ConstrainedRequest) -> list[tuple[str, Any]]:
    """The constraints in all fields of a request, each with its kind."""
    outputs = request.structured_outputs or StructuredOutputs()
    fields = (
        _of_format(request.response_format or ResponseFormat(type="text")),
        ("json", _json_value(outputs.json_)),
        ("json", ANY_OBJECT if outputs.json_object else None),
        ("json", _json_value(request.guided_json)),
        ("json", request.json_schema),
        ("regex", outputs.regex),
        ("regex", request.guided_regex),
        ("choice", outputs.choice),
        ("choice", request.guided_choice),
        ("grammar", outputs.grammar),
        ("grammar", request.guided_grammar),
        ("grammar", request.grammar or None),
    )
    return [(kind, value) for kind, value in fields if value is not None]


def _of_format(wanted: ResponseFormat) -> tuple[str, Any]:
    schema = wanted.schema_ if wanted.json_schema is None else wanted.json_schema.schema_
    match wanted.type:
        case "text":
            return "text", None
        case "json_object":
            return "json", ANY_OBJECT if schema is None else schema
        case "json_schema":
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


def _json_value(schema: Schema | str | None) -> Any:
    return parse_json(schema.encode(), "The JSON schema") if isinstance(schema, str) else schema
