"""What pydantic finds wrong with a request, in one sentence."""

from __future__ import annotations

import difflib
import functools
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from .openai.requests import ApiModel

_TYPES = ("str", "int", "float", "bool")
"""Alternatives of a union in pydantic's places."""
_SHOWN = 100  # characters of a name


@functools.cache
def known_fields() -> frozenset[str]:
    """The fields of all requests and of their parts."""
    kinds, names = [ApiModel], set[str]()
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
        names |= {field.alias or name for name, field in kind.model_fields.items()}
    return frozenset(names)


def describe_validation(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """One sentence about pydantic's `errors`, and the field that it is about.

    If alternatives of a union fail at the same place, the sentence names all of them; otherwise it is about the failure
    deepest in the value.
    """
    fields = [_field_of(error["loc"]) for error in errors]
    field = max((each for each in fields if each.startswith(fields[0])), key=len)
    told = [error for error, each in zip(errors, fields) if each == field]
    if told[0]["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field.rpartition(".")[2], known_fields(), 1)
        return f"{field} is no field of this request{f'; did you mean {near[0]}?' if near else '.'}", field
    messages = (error["msg"].removeprefix("Value error, ").partition(", unable to parse")[0] for error in told)
    reasons = dict.fromkeys(messages)
    first, *others = reasons
    reason = " or ".join([first, *(other.removeprefix("Input should be ") for other in others)])
    value = told[0].get("input")
    given = (
        f", not {reprlib.repr(value)}" if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
    )
    return f"{field or 'The body'}: {reason}{given if 'should be' in reason else ''}.", field


def _field_of(place: Sequence[str | int]) -> str:
    """`tools[0].function.name`: without the names of a union's alternatives, which are no fields."""
    field = ""
    for part in place:
        if isinstance(part, int):
            field += f"[{part}]"
        elif part != "body" and "[" not in part and part not in _TYPES:
            field += f".{part[:_SHOWN]}" if field else part[:_SHOWN]
    return field
