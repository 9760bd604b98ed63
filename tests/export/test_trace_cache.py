"""Traces that are kept on disk are those that are made, and nothing that happens to the files can do harm."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from gemma3n_onnx.export import trace, trace_cache
from gemma3n_onnx.graphs.audio import AudioConfig

CONFIG = AudioConfig(text_hidden_size=32, hidden_size=32, num_heads=2, num_layers=1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "new" / "cache"
    monkeypatch.setenv("GEMMA3N_CACHE", str(folder))
    trace._trace_audio.cache_clear()
    yield folder
    trace._trace_audio.cache_clear()


def traced() -> bytes:
    trace._trace_audio.cache_clear()
    model = trace.trace_audio(CONFIG)
    parameters = [name for name, value in model.graph.initializers.items() if value.const_value is None]
    for name in parameters:
        model.graph.inputs.append(model.graph.initializers.pop(name))
    return ir.serde.serialize_model(model).SerializeToString(deterministic=True)


@pytest.fixture
def no_trace(monkeypatch: pytest.MonkeyPatch):
    def forbid() -> None:
        monkeypatch.setattr(trace, "_trace", lambda *_: pytest.fail("traced again"))

    return forbid


def test_what_is_read_is_what_was_traced(folder: Path, no_trace) -> None:
    first = traced()
    no_trace()
    assert traced() == first
    assert len(list(folder.iterdir())) == 1


def test_another_configuration_or_code_is_another_trace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced()
    trace.trace_audio(AudioConfig(text_hidden_size=64, hidden_size=32, num_heads=2, num_layers=1))
    assert len(list(folder.iterdir())) == 2
    monkeypatch.setattr(trace_cache, "_code", lambda: "newer")
    traced()
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("left", [0, 100, 0.5])
def test_a_damaged_file_is_made_again(folder: Path, left: float) -> None:
    first = traced()
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: int(left * len(whole) if left < 1 else left)])
    assert traced() == first
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_does_not_matter(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = traced()
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("GEMMA3N_CACHE", str(tmp_path / "file" / "cache"))
    assert traced() == first


def test_a_user_without_a_home_has_no_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    first = traced()
    monkeypatch.delenv("GEMMA3N_CACHE")
    monkeypatch.setattr(Path, "home", homeless)
    assert traced() == first
