"""A few mutants of each kind; `bash ci/fuzz.sh MINUTES` tries many."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzzing import fuzz


@pytest.mark.parametrize(
    ("target", "inputs", "count"),
    [
        ("artifact", "small_artifact", 60),
        ("checkpoint", "small_full_checkpoint", 60),
        ("media", "small_checkpoint", 200),
        ("request", "small_artifact", 100),
    ],
)
def test_a_mutant_is_refused_or_answered_rightly(
    target: str, inputs: str, count: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    report = fuzz(target, request.getfixturevalue(inputs), 0, count, keep=tmp_path)
    assert not report.failures
    assert report.outcomes["refused"] > count / 10 and sum(report.outcomes.values()) == count
