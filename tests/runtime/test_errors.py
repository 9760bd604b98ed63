"""Errors say options as their caller writes them."""

from __future__ import annotations

import pytest

from gemma3n_onnx.runtime import errors
from gemma3n_onnx.runtime.errors import (
    AudioTooLongError,
    ContextLengthError,
    Gemma3nError,
    MediaNotFoundError,
    OptionError,
    as_flag,
)


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (OptionError("top_k must be 1, not 0.", option="top_k"), "--top-k must be 1, not 0."),
        (OptionError("top_k must be 1, not 0."), "top_k must be 1, not 0."),
        (ContextLengthError("a_b is 1; lower a_b.", option="a_b"), "--a-b is 1; lower --a-b."),
        (AudioTooLongError('Give a_b="split" to it.', option="a_b"), "Give --a-b split to it."),
        (MediaNotFoundError("Load with a_b=FILE, or a_b_c.", option="a_b"), "Load with --a-b FILE, or a_b_c."),
        (OptionError("/x/a_b.wav, 'a_b' and a_b/c: a_b.", option="a_b"), "/x/a_b.wav, 'a_b' and a_b/c: --a-b."),
    ],
)
def test_an_option_is_spelled_as_a_flag(error: Gemma3nError, shown: str) -> None:
    assert error.spelled(as_flag) == shown
    assert "--" not in str(error)


def test_every_error_takes_an_option() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Gemma3nError)]
    assert len(kinds) > 10
    for kind in kinds:
        error = kind() if kind is errors.ClosedError else kind("x is 1.", option="x")
        assert error.spelled(as_flag) in ("--x is 1.", str(error))


def test_a_long_message_loses_its_middle() -> None:
    told = str(OptionError(f"stop is {'x' * 100_000}; give a shorter one."))
    assert len(told) == errors.LONGEST_MESSAGE
    assert told.startswith("stop is xxx") and told.endswith("x; give a shorter one.") and " … " in told
