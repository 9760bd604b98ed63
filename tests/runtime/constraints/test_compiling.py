"""Compiling a client's constraint takes neither the process nor much time along."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gemma3n_onnx.runtime.artifact import load_manifest
from gemma3n_onnx.runtime.constraints.deep_stack import with_deep_stack
from gemma3n_onnx.runtime.constraints.grammar import Grammars
from gemma3n_onnx.runtime.errors import OptionError

FUZZER = Path(__file__).parents[2] / "fuzz" / "grammars.py"


@pytest.fixture(scope="module")
def grammars(demo_artifact: Any) -> Grammars:
    folder = demo_artifact("E2B")
    return Grammars(folder, load_manifest(folder))


def chain(count: int, depth: int) -> dict[str, Any]:
    """Definitions that refer to each other, each of `depth` levels."""
    defs: dict[str, Any] = {f"d{count}": {"type": "string"}}
    for number in range(count):
        schema: dict[str, Any] = {"$ref": f"#/$defs/d{number + 1}"}
        for _ in range(depth):
            schema = {"type": "object", "additionalProperties": schema}
        defs[f"d{number}"] = schema
    return {"$ref": "#/$defs/d0", "$defs": defs}


def test_a_long_chain_of_references_does_not_overflow_the_stack(grammars: Grammars) -> None:
    grammars.json_of(chain(52, 92))  # 4,784 levels


@pytest.mark.parametrize("count", [25_000, 40_000])
def test_a_schema_of_many_names_is_refused_at_once(grammars: Grammars, count: int) -> None:
    started = time.process_time()
    with pytest.raises(OptionError, match="send a smaller one"):
        grammars.json_of({"type": "object", "required": [f"name{i}" for i in range(count)]})
    assert time.process_time() - started < 0.5


def test_a_small_schema_compiles_fast(grammars: Grammars) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    grammars.json_of(schema)
    started = time.process_time()
    for _ in range(20):
        grammars.json_of(schema)
    assert time.process_time() - started < 0.2


def test_other_threads_keep_their_stack_size() -> None:
    before = threading.stack_size()
    assert with_deep_stack(lambda: threading.current_thread().name) == "grammar"
    with pytest.raises(ZeroDivisionError):
        with_deep_stack(lambda: 1 // 0)
    assert threading.stack_size() == before


def test_random_constraints_crash_nothing(demo_artifact: Any) -> None:
    run = subprocess.run(
        [sys.executable, FUZZER, demo_artifact("E2B"), "0", "30"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
