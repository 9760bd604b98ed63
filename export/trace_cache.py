"""Caches traced graphs on disk: a trace takes seconds and depends only on code and configuration.

The folder is `GEMMA3N_CACHE`, by default `~/.cache/gemma3n-onnx`. A file's name is a hash of all inputs of the trace,
so an entry is never stale. A file is a SHA-256 of its name and its model, then the model; one whose hash differs is
traced again and replaced. The folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import ParamSpec

import onnx
import onnx_ir as ir
from filelock import FileLock

import gemma3n_onnx.graphs
from gemma3n_onnx.runtime.system import cache_folder

P = ParamSpec("P")
_MADE_BY = ("onnx-ir", "onnxscript", "torch")
_INPUTS = "gemma3n_onnx.inputs"
_DIGEST_BYTES = hashlib.sha256().digest_size
_LONGEST_TRACE_S = 300.0


def kept_on_disk(trace: Callable[P, ir.Model]) -> Callable[P, ir.Model]:
    """Caches a function whose arguments have a complete repr. Ignores a cache folder that cannot be used."""

    @functools.wraps(trace)
    def kept(*arguments: P.args, **named: P.kwargs) -> ir.Model:
        told = repr((trace.__name__, arguments, sorted(named.items()), _code()))
        name = f"{hashlib.sha256(told.encode()).hexdigest()}.trace"
        if (model := _load(name)) is not None:
            return model
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError, RuntimeError):
                stack.enter_context(_alone(cache_folder() / name))
            if (model := _load(name)) is not None:
                return model
            model = trace(*arguments, **named)
            with contextlib.suppress(OSError, RuntimeError):
                _save(model, cache_folder() / name)
            return model

    return kept


def _alone(path: Path) -> FileLock:
    """Waits for another process that runs the same trace."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_suffix(".lock"), timeout=_LONGEST_TRACE_S)


@functools.cache
def _code() -> str:
    """A hash of the tracing code, and the versions of the packages that it uses."""
    digest = hashlib.sha256()
    graphs = sorted(source for path in gemma3n_onnx.graphs.__path__ for source in Path(path).glob("*.py"))
    for source in (*graphs, *(Path(__file__).with_name(name) for name in ("trace.py", "repeat.py"))):
        digest.update(source.read_bytes())
    return f"{digest.hexdigest()} {[version(name) for name in _MADE_BY]}"


def _save(model: ir.Model, path: Path) -> None:
    """Saves parameters, which have no data, as extra graph inputs."""
    model = model.clone()
    graph = model.graph
    model.metadata_props[_INPUTS] = str(len(graph.inputs))
    for name, value in [*graph.initializers.items()]:
        if value.const_value is None:
            graph.inputs.append(graph.initializers.pop(name))
    content = ir.serde.serialize_model(model).SerializeToString()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as beside:
        made = Path(beside) / path.name
        made.write_bytes(_digest(path.name, content) + content)
        os.replace(made, path)


def _load(name: str) -> ir.Model | None:
    """None if the file is missing or damaged."""
    with contextlib.suppress(OSError, RuntimeError):
        whole = (cache_folder() / name).read_bytes()
        digest, content = whole[:_DIGEST_BYTES], whole[_DIGEST_BYTES:]
        if digest != _digest(name, content):
            return None
        model = ir.serde.deserialize_model(onnx.ModelProto.FromString(content))
        graph = model.graph
        for value in graph.inputs[int(model.metadata_props.pop(_INPUTS)) :]:
            graph.inputs.remove(value)
            graph.initializers[value.name] = value  # type: ignore[index]
        return model
    return None


def _digest(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + content).digest()
