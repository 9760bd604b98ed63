"""Fixtures that several rooms' tests share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import one_core  # noqa: F401  # before anything that starts threads
from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.export.checkpoint.make_checkpoint import make_checkpoint
from gemma3n_onnx.export.pipeline import ExportOptions, export
from gemma3n_onnx.export.progress import TerminalProgress
from gemma3n_onnx.export.verify.torchvision_shim import complete_torchvision
from gemma3n_onnx.runtime import GenerationOptions
from gemma3n_onnx.runtime.generation.scheduler import Scheduler
from support import SMALL, text_checkpoint

complete_torchvision()  # before a test imports transformers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest goes first, so that no worker waits for the one that has it."""
    items.sort(key=lambda item: item.path.name != "test_docs.py")


def _common(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder of all processes of this run."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if hasattr(request.config, "workerinput") else folder


@pytest.fixture(scope="session", autouse=True)
def trace_cache(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[None]:
    """Traces of this run, and no others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA3N_CACHE", str(_common(tmp_path_factory, request) / "traces"))
        yield


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[GenerationOptions]:
    """The options of every request that reaches a scheduler."""
    seen: list[GenerationOptions] = []
    submit = Scheduler.submit

    def record(self: Scheduler, request: Any) -> None:
        seen.append(request.options)
        submit(self, request)

    monkeypatch.setattr(Scheduler, "submit", record)
    return seen


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-only checkpoint of E4B's depth with every feature, a few MB; tests must not write into it."""
    return text_checkpoint("tiny", tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, traced in seconds; tests must not write into it."""
    return text_checkpoint("tiny", tmp_path_factory.mktemp("small_checkpoint") / "small", overrides=SMALL)


@pytest.fixture(scope="session")
def small_artifact(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of `small_checkpoint`, whole, fp32 for the CPU; tests must not write into it."""
    folder = tmp_path_factory.mktemp("small_artifact") / "artifact"
    export(Checkpoint.open(small_checkpoint), folder, ExportOptions(), TerminalProgress(quiet=True))
    return folder


@pytest.fixture(scope="session")
def small_full_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers and reduced encoders; tests must not write into it."""
    overrides = SMALL | {"max_position_embeddings": 2048}
    return make_checkpoint("tiny", tmp_path_factory.mktemp("small_full_checkpoint") / "small", overrides=overrides)


@pytest.fixture(scope="session")
def small_full_artifact(small_full_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of `small_full_checkpoint`, encoders included; tests must not write into it."""
    folder = tmp_path_factory.mktemp("small_full_artifact") / "artifact"
    export(Checkpoint.open(small_full_checkpoint), folder, ExportOptions(), TerminalProgress(quiet=True))
    return folder


@pytest.fixture(scope="session")
def demo_artifact(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """`demo_artifact(slice)`: the exported demo, made once for all processes; tests must not write into it."""
    folder = _common(tmp_path_factory, request)

    def exported(name: str) -> Path:
        path = folder / f"demo-{name}"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                export(Checkpoint.open("demo"), path, ExportOptions(slice=name), TerminalProgress(quiet=True))
        return path

    return exported
