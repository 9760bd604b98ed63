"""Checks of values that users give."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np

from .errors import OptionError


def is_integer(value: Any) -> bool:
    """Whether it is a Python or numpy integer, but not a bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def require_integer(name: str, value: Any, low: int, high: float = math.inf) -> None:
    """Raises OptionError unless `value` is an integer from `low` to `high`."""
    if not is_integer(value) or not low <= value <= high:
        limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise OptionError(f"{name} must be a whole number {limits}, not {value!r}.", option=_option(name))


def require_real(name: str, value: Any, accepts: Callable[[float], bool], limits: str) -> None:
    """Raises OptionError unless `value` is a finite number that `accepts` takes; `limits` describes the range."""
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not (is_number and accepts(float(value))):
        raise OptionError(f"{name} must be a number {limits}, not {value!r}.", option=_option(name))


def _option(name: str) -> str | None:
    """`name`, unless it describes a part of an option."""
    return name if name.isidentifier() else None
