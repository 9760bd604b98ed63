"""A Jinja sandbox in which a template can run only so long and make only so much.

Python cannot stop a thread, so the template itself counts: each loop step, call, operator and output takes from a
budget before it runs. What a single operation would make is charged before it is made.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextvars import ContextVar
from string import Formatter
from types import BuiltinMethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, _PassArg, pass_context
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 1 << 20
MAX_CHARACTERS = 64 << 20
"""What a rendering may make, characters of its prompt and of everything on the way."""
MAX_STEPS = 1_000_000
MAX_SECONDS = 10.0
_STEP = MAX_CHARACTERS // MAX_STEPS
_MAX_NUMBER = 1 << 16  # given to a filter or a method: a width, a precision, a count
_MAX_BITS = 1 << 16  # of an integer

_REMOVED_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
_REMOVED_GLOBALS = ("lipsum",)
_WIDENING_FILTERS = {"e", "escape", "forceescape", "tojson", "urlencode"}
_WIDENING = 8  # characters of one that is escaped
# Filters that look at the items of a list, but not into them.
_SHALLOW_FILTERS = {
    *("attr", "batch", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list"),
    *("map", "max", "min", "random", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sort"),
    "unique",
}
_TEXT_METHODS = {
    *("capitalize", "casefold", "count", "encode", "endswith", "find", "index", "isalnum", "isalpha", "isascii"),
    *("isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper"),
    *("lower", "lstrip", "partition", "removeprefix", "removesuffix", "rfind", "rindex", "rpartition", "rsplit"),
    *("rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper"),
    *("center", "join", "ljust", "replace", "rjust", "zfill"),
}
_METHODS: dict[type, set[str]] = {
    str: _TEXT_METHODS,
    dict: {"copy", "get", "items", "keys", "values"},
    list: {"copy", "count", "index"},
    tuple: {"count", "index"},
}
_CHEAP_METHODS = {"get", "items", "keys", "values"}


class LimitError(jinja2.TemplateError):
    """The template runs too long or makes too much."""


class _Budget:
    def __init__(self) -> None:
        self._left = MAX_CHARACTERS
        self._deadline = time.monotonic() + MAX_SECONDS

    def take(self, characters: int) -> None:
        """Takes one step and `characters`."""
        self._left -= _STEP + characters
        if self._left < 0:
            raise LimitError(f"it takes more than {MAX_STEPS:,} steps or makes more than {MAX_CHARACTERS:,} characters")
        if time.monotonic() > self._deadline:
            raise LimitError(f"it takes more than {MAX_SECONDS:g} seconds")


_budget: ContextVar[_Budget] = ContextVar("budget")


def _take(characters: int = 0) -> None:
    _budget.get().take(characters)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Render its templates with `render_bounded`."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, filters: Mapping[str, Callable[..., Any]], extensions: list[str | type[Extension]]) -> None:
        """`filters` are added to Jinja's own."""
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=extensions)
        for name in _REMOVED_GLOBALS:
            del self.globals[name]
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        self.filters |= {"sum": _sum, **filters}
        self.filters = {name: _bounded_filter(name, function) for name, function in self.filters.items()}
        self.filters |= {_COUNTED: _counted_filter, _CONCATENATED: _concatenated}
        self.filters |= {_PRINTED: _printed, _STEPPED: _stepped}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Bounding().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _take(_made_by(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as jinja2 has it
        if isinstance(__obj, BuiltinMethodType) and __obj.__self__ is not None:
            _check_method(__obj.__self__, __obj.__name__, [*args, *kwargs.values()])
        elif isinstance(__obj, LoopContext):
            args = tuple(map(_counted, args))
        _take()
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatting = super().wrap_str_format(value)
        if formatting is None:
            return None
        text = str(value.__self__)

        def bounded(*args: Any, **kwargs: Any) -> str:
            if any("{" in (spec or "") for _, _, spec, _ in Formatter().parse(text)):
                raise jinja2.TemplateError("a width of str.format may not come from an argument")
            _take(_formatted(text, "{", (args, kwargs)))
            return formatting(*args, **kwargs)

        return bounded


def render_bounded(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """Raises LimitError, and whatever the template raises."""
    token = _budget.set(_Budget())
    try:
        return template.render(variables)
    finally:
        _budget.reset(token)


# --- the template's own code ---------------------------------------------------------------------------------

# Filters that the nodes of a template are wrapped into; no template can spell them.
_COUNTED, _CONCATENATED, _PRINTED, _STEPPED = "counted items", "concatenated", "printed text", "stepped value"


class _Bounding(NodeTransformer):
    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _COUNTED)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [
            _filtered(nodes.Const(each.data) if isinstance(each, nodes.TemplateData) else each, _PRINTED)
            for each in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes), _CONCATENATED)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, _STEPPED)


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@pass_context
def _counted_filter(_: Context, items: Iterable[Any]) -> _Counted | jinja2.Undefined:
    return _counted(items)


@pass_context
def _concatenated(_: Context, parts: list[Any]) -> str:
    _take(_size(parts))
    return "".join(map(str, parts))


@pass_context
def _printed(_: Context, value: Any) -> str:
    _take(_size(value))
    return str(value)


@pass_context
def _stepped(_: Context, value: Any) -> Any:
    _take()
    return value


class _Counted:
    """Items that take a step each."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            _take()
            yield item


class _CountedSized(_Counted):
    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]


def _counted(items: Any) -> Any:
    if isinstance(items, _Counted | jinja2.Undefined):
        return items
    iter(items)  # the error of what cannot be iterated
    return (_CountedSized if isinstance(items, Sized) else _Counted)(items)


# --- filters, methods and operators --------------------------------------------------------------------------


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passed = _PassArg.from_obj(function)

    @functools.wraps(function)
    def bounded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(value, str | Mapping | Sized | jinja2.Undefined) and isinstance(value, Iterable):
            value = list(_counted(value)) if name not in _SHALLOW_FILTERS else _counted(value)
        given = [*args, *kwargs.values()]
        if name not in ("d", "default"):
            _require_small(given)
        size = _length(value) if name in _SHALLOW_FILTERS else _size(value)
        _take(size * (_WIDENING if name in _WIDENING_FILTERS else 1) + _made_by_filter(name, value, size, given))
        match passed:
            case None:
                return function(value, *args, **kwargs)
            case _PassArg.context:
                return function(context, value, *args, **kwargs)
            case _PassArg.eval_context:
                return function(context.eval_ctx, value, *args, **kwargs)
            case _:
                return function(context.environment, value, *args, **kwargs)

    return pass_context(bounded)


def _made_by_filter(name: str, value: Any, size: int, given: list[Any]) -> int:
    """Characters or items beside those of `value`."""
    numbers = sum(abs(each) for each in given if isinstance(each, int))
    match name:
        case "replace":
            return _replaced(str(value), *map(str, given[:2])) if len(given) > 1 else 0
        case "format":
            return _formatted(str(value), "%", given)
        case "join":
            return _length(value) * _size(given)
        case "indent" | "tojson":
            width = max([numbers, *(len(each) for each in given if isinstance(each, str))], default=0)
            return width * (size if name == "tojson" else str(value).count("\n") + 1)
        case _:
            return numbers + (0 if name in _SHALLOW_FILTERS else _size(given))


def _sum(values: Iterable[Any], attribute: str | int | None = None, start: float = 0) -> Any:
    """Of numbers only: a sum of lists copies each of them again and again."""
    picked = [value if attribute is None else value[attribute] for value in values]
    if not all(isinstance(value, int | float) for value in [start, *picked]):
        raise jinja2.TemplateError("sum takes numbers only")
    return sum(picked, start)


def _check_method(owner: Any, name: str, given: list[Any]) -> None:
    """Takes from the budget for a method of a builtin type."""
    known = next((names for kind, names in _METHODS.items() if isinstance(owner, kind)), set())
    if name not in known:
        raise jinja2.TemplateError(f"{type(owner).__name__}.{name} is not available to chat templates")
    _require_small(given)
    if name in _CHEAP_METHODS:
        return
    made = sum(abs(each) for each in given if isinstance(each, int)) + _size([each for each in given if each != owner])
    if name == "replace" and len(given) > 1:
        made += _replaced(owner, *map(str, given[:2]))
    if name == "join" and given:
        made += _length(given[0]) * len(owner)
    _take(_length(owner) + made)


def _require_small(given: Iterable[Any]) -> None:
    for each in given:
        if isinstance(each, int) and abs(each) > _MAX_NUMBER:
            raise LimitError(f"it gives a function the number {each:,}, which is above {_MAX_NUMBER:,}")


def _made_by(operator: str, left: Any, right: Any) -> int:
    """Characters, items or bits that an operator makes."""
    if operator == "%" and isinstance(left, str):
        return _formatted(left, "%", right)
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        return _bits(left.bit_length() * max(right, 0))
    if operator == "*":
        if isinstance(left, int) and isinstance(right, int):
            return _bits(left.bit_length() + right.bit_length())
        many, times = (right, left) if isinstance(left, int) else (left, right)
        return _length(many) * max(times, 0) if isinstance(times, int) else 0
    return _length(left) + _length(right)


def _bits(count: int) -> int:
    if count > _MAX_BITS:
        raise LimitError(f"it computes a number of {count:,} bits, which is above {_MAX_BITS:,}")
    return count


def _formatted(text: str, mark: str, arguments: Any) -> int:
    """At most this many characters: every width and precision, and for each field all arguments."""
    if mark == "%" and re.search(r"%[^%a-zA-Z]*\*", text):
        raise jinja2.TemplateError("a width of % formatting may not come from an argument")
    widths = sum(int(digits[:12]) for digits in re.findall(r"\d+", text))
    return len(text) + widths + text.count(mark) * _size(arguments)


def _replaced(text: str, old: str, new: str) -> int:
    return (text.count(old) if old else len(text) + 1) * len(new)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, Sized) and not isinstance(value, jinja2.Undefined) else 1


def _size(value: Any) -> int:
    """Characters of a value as text, about; each item of a container takes a step."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset | range):
        size = 2
        for item in value:
            _take()
            size += 2 + _size(item)
        return size
    return value.bit_length() if isinstance(value, int) else 32
