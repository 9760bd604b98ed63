"""Traces repeated parts of a module once per kind.

Tracing costs about the same for every operation, and most operations are in layers that differ only in their weights.
When a module calls `repeated`, the trace has the operations of the first call of a kind, between two marker nodes, and
one node for each later call. `export.repeat` expands these nodes into the same operations on the call's own weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic_multi_out

DOMAIN = "gemma3n_onnx.repeated"
BEGIN, END, CALL = "Begin", "End", "Call"
KIND = "kind"

T = TypeVar("T")


@dataclass
class RepeatedKind:
    """The first call of a kind. `outputs` is its return value, with each tensor replaced by its index among inputs and
    results; `results` has the dtypes and shapes of the results."""

    number: int
    parameters: list[str]
    """Names in the model of the parameters of the first call's module."""
    outputs: Any = None
    results: list[tuple[torch.dtype, torch.Size]] = field(default_factory=list)


Kinds = dict[Any, RepeatedKind]
_KINDS: ContextVar[Kinds | None] = ContextVar("kinds", default=None)


@contextmanager
def one_of_each(model: nn.Module) -> Iterator[Kinds]:
    """In this context `repeated` traces one call of each kind. Yields the kinds."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        module.repeated_parameters = [prefix + key for key, _ in module.named_parameters()]  # type: ignore[assignment]
        module.repeated_signature = _signature(module)  # type: ignore[assignment]
    kinds: Kinds = {}
    token = _KINDS.set(kinds)
    try:
        yield kinds
    finally:
        _KINDS.reset(token)


def repeated(method: Callable[..., T], *inputs: Any) -> T:
    """`method(*inputs)` of a module that the model may hold several times.

    The method must be pure. It may read only `inputs` (tensors, and dataclasses and tuples of tensors) and its module's
    parameters and buffers, may not call `repeated`, and may not return an output of the whole model.
    """
    kinds = _KINDS.get()
    if kinds is None:
        return method(*inputs)
    module: Any = method.__self__  # type: ignore[attr-defined]
    tensors: list[Tensor] = []
    form = _take_out(inputs, tensors)
    key = (module.repeated_signature, method.__name__, repr(form), *((x.dtype, x.shape) for x in tensors))
    if (kind := kinds.get(key)) is None:
        kind = kinds[key] = RepeatedKind(len(kinds), module.repeated_parameters)
        return _define(kind, method, form, tensors)
    called = _mark(CALL, kind, [*tensors, *module.parameters()], kind.results)
    return _put_in(kind.outputs, [*tensors, *called])


def _define(kind: RepeatedKind, method: Callable[..., T], form: Any, tensors: Sequence[Tensor]) -> T:
    begun = _mark(BEGIN, kind, tensors, [(x.dtype, x.shape) for x in tensors])
    made = method(*_put_in(form, begun))
    outputs = list(begun)
    kind.outputs = _take_out(made, outputs)
    results = outputs[len(begun) :]
    kind.results = [(x.dtype, x.shape) for x in results]
    return _put_in(kind.outputs, [*tensors, *_mark(END, kind, results, kind.results)])


def _mark(
    mark: str, kind: RepeatedKind, inputs: Sequence[Tensor], outputs: Sequence[tuple[torch.dtype, torch.Size]]
) -> Sequence[Tensor]:
    return symbolic_multi_out(
        f"{DOMAIN}::{mark}",
        inputs,
        {KIND: kind.number},
        dtypes=[dtype for dtype, _ in outputs],
        shapes=[shape for _, shape in outputs],
        version=1,
    )


@dataclass(frozen=True)
class _Place:
    index: int


def _take_out(value: Any, tensors: list[Tensor]) -> Any:
    """`value` with a `_Place` for each tensor; new tensors are appended to `tensors`."""

    def place(tensor: Tensor) -> _Place:
        for index, known in enumerate(tensors):
            if known is tensor:
                return _Place(index)
        tensors.append(tensor)
        return _Place(len(tensors) - 1)

    return _with_each(value, Tensor, place)


def _put_in(form: Any, tensors: Sequence[Tensor]) -> Any:
    """The inverse of `_take_out`."""
    return _with_each(form, _Place, lambda place: tensors[place.index])


def _with_each(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """`value` with `change` applied to every instance of `kind` in its tuples and dataclasses."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_with_each(part, kind, change) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: _with_each(getattr(value, f.name), kind, change) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value


def _signature(module: nn.Module) -> str:
    """Everything that the `repeated` methods of a module depend on, except parameter values.

    Excludes private attributes and those listed in `not_repeated`: `repeated` methods may not read them.
    """
    told = []
    for name, part in module.named_modules():
        left_out = getattr(part, "not_repeated", ())
        settings = {k: v for k, v in vars(part).items() if not k.startswith(("_", "repeated_")) and k not in left_out}
        shapes = [(key, x.dtype, tuple(x.shape)) for key, x in part.named_parameters(recurse=False)]
        constants = [(key, x.dtype, x.tolist()) for key, x in part.named_buffers(recurse=False)]
        told.append((name, type(part).__qualname__, settings, shapes, constants))
    return repr(told)
