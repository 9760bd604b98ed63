"""Traces that are kept on disk are those that are made, and nothing that happens to the files can do harm."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx_ir as ir
import pytest

from gemma3n_onnx.export import trace, trace_cache
from gemma3n_onnx.graphs.audio import AudioConfig


def comparable(model: ir.Model) -> bytes:
    """Parameters, which have no data, as inputs."""
    model = model.clone()
    for name in [name for name, value in model.graph.initializers.items() if value.const_value is None]:
        model.graph.inputs.append(model.graph.initializers.pop(name))
    return ir.serde.serialize_model(model).SerializeToString(deterministic=True)


def files(folder: Path) -> list[Path]:
    return list(folder.glob("*.trace"))


class Tracer:
    """Makes x @ parameter + constant, and counts how often."""

    def __init__(self) -> None:
        self.count = 0
        self.kept = trace_cache.kept_on_disk(self.make)

    def make(self, width: int) -> ir.Model:
        self.count += 1
        kind = ir.TensorType(ir.DataType.FLOAT)
        x, parameter, constant = (ir.Value(name=n, type=kind, shape=ir.Shape([width])) for n in ("x", "p", "c"))
        constant.const_value = ir.tensor([1.0] * width, name="c")
        product = ir.node("MatMul", [x, parameter], outputs=[ir.Value(name="xp")], name="product")
        total = ir.node("Add", [product.outputs[0], constant], outputs=[ir.Value(name="y")], name="total")
        graph = ir.Graph([x], total.outputs, nodes=[product, total], initializers=[constant], opset_imports={"": 23})
        graph.initializers["p"] = parameter
        return ir.Model(graph, ir_version=10)

    def traced(self, width: int = 2) -> bytes:
        return comparable(self.kept(width))


@pytest.fixture
def tracer() -> Tracer:
    return Tracer()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "new" / "cache"
    monkeypatch.setenv("GEMMA3N_CACHE", str(folder))
    return folder


def test_a_real_trace_is_read_as_it_was_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AudioConfig(text_hidden_size=32, hidden_size=32, num_heads=2, num_layers=1)
    trace._trace_audio.cache_clear()
    first = comparable(trace.trace_audio(config))
    trace._trace_audio.cache_clear()
    monkeypatch.setattr(trace, "_trace", lambda *_: pytest.fail("traced again"))
    assert comparable(trace.trace_audio(config)) == first
    trace._trace_audio.cache_clear()


def test_what_is_kept_is_not_made_again(folder: Path, tracer: Tracer) -> None:
    first = tracer.traced()
    assert tracer.traced() == first
    assert tracer.count == len(files(folder)) == 1


def test_another_configuration_or_code_is_another_trace(
    folder: Path, tracer: Tracer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracer.traced(2) != tracer.traced(3)
    monkeypatch.setattr(trace_cache, "_code", lambda: "newer")
    tracer.traced(2)
    assert tracer.count == len(files(folder)) == 3


@pytest.mark.parametrize("left", [0.0, 0.1, 0.5, 0.99])
def test_a_damaged_file_is_made_again(folder: Path, tracer: Tracer, left: float) -> None:
    first = tracer.traced()
    (file,) = files(folder)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(left * len(whole))])
    assert tracer.traced() == first
    assert file.read_bytes() == whole


def test_no_flipped_bit_loads(folder: Path, tracer: Tracer) -> None:
    first = tracer.traced()
    (file,) = files(folder)
    whole = file.read_bytes()
    draw = random.Random(0)
    for flips in range(1, 101):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        assert tracer.traced() == first
        assert (tracer.count, file.read_bytes()) == (1 + flips, whole)


def test_another_trace_under_its_name_is_made_again(folder: Path, tracer: Tracer) -> None:
    first, second = tracer.traced(2), tracer.traced(3)
    one, other = files(folder)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    assert (tracer.traced(2), tracer.traced(3), tracer.count) == (first, second, 4)


def test_processes_that_want_the_same_trace_make_it_once(folder: Path, tracer: Tracer) -> None:
    """One makes it while the others wait; threads stand for processes, as each call opens the lock anew."""

    def slowly(width: int) -> ir.Model:
        time.sleep(0.3)
        return tracer.make(width)

    slowly.__name__ = "make"
    kept = trace_cache.kept_on_disk(slowly)
    with ThreadPoolExecutor(3) as pool:
        made = {comparable(model) for model in pool.map(kept, [2, 2, 2])}
    assert len(made) == tracer.count == 1


def test_a_folder_that_cannot_be_written_does_not_matter(
    tmp_path: Path, tracer: Tracer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("GEMMA3N_CACHE", str(tmp_path / "file" / "cache"))
    assert tracer.traced() == tracer.traced()
    assert tracer.count == 2


def test_a_user_without_a_home_has_no_cache(tracer: Tracer, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GEMMA3N_CACHE")
    monkeypatch.setattr(Path, "home", homeless)
    assert tracer.traced() == tracer.traced()
    assert tracer.count == 2
