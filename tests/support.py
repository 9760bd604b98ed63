"""A small model, and the command lines run in this process as their console scripts run them."""

import contextlib
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint, EntryPoints
from inspect import isabstract
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import TYPE_CHECKING, Any

import onnx
import pytest

from gemma3n_onnx.export.checkpoint.make_checkpoint import make_checkpoint
from gemma3n_onnx.export.cli import main as export_cli
from gemma3n_onnx.runtime.artifact import MANIFEST
from gemma3n_onnx.runtime.cli import commands
from gemma3n_onnx.runtime.cli import main as runtime_cli

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The fewest layers with both attention types, a reader of a donor, and an own K and V for each type.
SMALL = {
    "num_hidden_layers": 3,
    "num_kv_shared_layers": 1,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "max_position_embeddings": 256,
}

# A checkpoint without encoders, which is traced and read faster.
text_checkpoint = partial(make_checkpoint, text_only=True)


def save_as_transformers(model: "PreTrainedModel", checkpoint: Path, folder: Path) -> Path:
    """What `model.save_pretrained` writes, with the tokenizer and the other files of `checkpoint`."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("config.json", "model*.safetensors*"))
    model.save_pretrained(folder)
    return folder


def record(folder: Path, name: str) -> None:
    """Gives the manifest of an artifact the size and the checksum that a file now has; without the id of the export,
    which covers the checksums of weights."""
    path, content = folder / MANIFEST, (folder / name).read_bytes()
    manifest = json.loads(path.read_text())
    if name.endswith((".bin", ".data")):
        manifest.pop("export_id", None)
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(manifest))


def graph_of(path: Path) -> bytes:
    """A graph as it is in the file, without the id of its export."""
    model = onnx.load(path, load_external_data=False)
    del model.metadata_props[:]
    return model.SerializeToString()


# First lines of a subprocess: one started by a background job would ignore Ctrl-C, as that job does.
DEFAULT_SIGNALS = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""

ENTRY_POINTS = EntryPoints(
    EntryPoint(name, f"gemma3n_onnx.export.{function}", commands.COMMANDS_GROUP)
    for name, function in (
        ("export", "cli.export:export_command"),
        ("make-checkpoint", "cli.make_checkpoint:make_checkpoint"),
        ("slices", "cli.slices:slices"),
        ("verify", "verify.command:verify"),
    )
)


def fake_entry_points(**selection: Any) -> EntryPoints:
    return ENTRY_POINTS.select(**selection)


def concrete_subclasses(base: type, package: ModuleType) -> set[type]:
    """The subclasses of `base` that the modules of a package define, abstract ones left out."""
    modules = [import_module(f"{package.__name__}.{info.name}") for info in iter_modules(package.__path__)]
    defined = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    return {each for each in defined if issubclass(each, base) and not isabstract(each)}


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def run_command(monkeypatch: pytest.MonkeyPatch, command: Sequence[str]) -> Outcome:
    """`command` is `gemma3n` or `gemma3n-export` and its arguments."""
    monkeypatch.setattr(sys, "argv", list(command))
    monkeypatch.setattr(commands, "entry_points", fake_entry_points)
    main = {"gemma3n": runtime_cli.main, "gemma3n-export": export_cli.main}[command[0]]
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit_:
        main()
    code = exit_.value.code
    texts = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    return Outcome(code if isinstance(code, int) else 0 if code is None else 1, *texts)
