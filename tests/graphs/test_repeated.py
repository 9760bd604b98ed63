"""What `repeated` saves a trace changes nothing: the graph is the one of a trace through every part."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from gemma3n_onnx.export import trace
from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.graphs.audio import AudioConfig
from gemma3n_onnx.graphs.layers import Linear
from gemma3n_onnx.graphs.repeated import DOMAIN, repeated
from gemma3n_onnx.graphs.vision import VisionConfig

DEMO = Checkpoint.open("demo")
VISION, AUDIO = VisionConfig.from_hf(DEMO.config), AudioConfig.from_hf(DEMO.config)
TRACES = {
    "decoder": lambda: trace._trace_decoder.__wrapped__.__wrapped__(DEMO.text_config, "last", "fp32", True),
    "audio encoder": lambda: trace._trace_audio.__wrapped__.__wrapped__(AUDIO),
    "vision encoder": lambda: trace._trace_vision.__wrapped__.__wrapped__(VISION),
}


@contextlib.contextmanager
def none_of_them(model: nn.Module) -> Iterator[dict]:
    yield {}


def told(model: ir.Model) -> list:
    """Every node with all that it is computed from, whatever values are called."""
    graph = model.graph
    names: dict[ir.Value, object] = {value: value.name for value in graph.inputs}
    for name, value in graph.initializers.items():
        constant = value.const_value
        names[value] = name if constant is None else (constant.dtype, constant.shape.numpy(), constant.tobytes())
    nodes = []
    for node in graph:
        inputs = tuple(None if value is None else names[value] for value in node.inputs)
        nodes.append(hash((node.domain, node.op_type, inputs, str(sorted(node.attributes.items())))))
        names |= {output: (nodes[-1], index) for index, output in enumerate(node.outputs)}
    return [Counter(nodes), [(value.name, names[value]) for value in graph.outputs]]


@pytest.mark.full_size
@pytest.mark.parametrize("part", TRACES)
def test_a_whole_trace_is_the_same_graph(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    once = TRACES[part]()
    monkeypatch.setattr(trace, "one_of_each", none_of_them)
    assert told(TRACES[part]()) == told(once)
    assert not any(node.domain == DOMAIN for node in once.graph)


class Part(nn.Module):
    """x [T, 4] and y [T, 4] -> their mix [T, 4], and y as it came."""

    calls: ClassVar[int] = 0

    def __init__(self, factor: float, constant: float) -> None:
        super().__init__()
        self.factor = factor
        self.never_read = nn.Parameter(torch.zeros(8))
        self.linear = Linear(4, 4)
        self.register_buffer("constant", torch.tensor([constant]), persistent=False)

    def mix(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        Part.calls += 1
        return self.linear(x) * self.factor + self.constant * y, y


class Stack(nn.Module):
    def __init__(self, *parts: Part) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2.0
        for part in self.parts:
            x, y = repeated(part.mix, x, y)
        return x - y


STACKS = {
    "alike": [(0.5, 1.0)] * 4,
    "two kinds in turn": [(0.5, 1.0), (2.0, 1.0)] * 2,
    "another setting": [(0.5, 1.0)] * 3 + [(2.0, 1.0)],
    "another constant": [(0.5, 1.0)] * 3 + [(0.5, 3.0)],
}


def traced(model: nn.Module) -> ir.Model:
    arguments = (torch.empty(trace.AXES["new_tokens"], 4, device="meta"),)
    return trace._trace(lambda: model, "fp32", arguments, ["x"], ["y"])


@pytest.mark.parametrize("settings", STACKS.values(), ids=STACKS)
def test_each_part_computes_with_its_own(settings: list[tuple[float, float]]) -> None:
    torch.manual_seed(0)
    model = Stack(*(Part(*each) for each in settings))
    weights = {name: torch.randn(4, 4) for name, _ in model.named_parameters() if name.endswith("weight")}
    x = torch.randn(3, 4)
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        expected = model(x).numpy()

    Part.calls = 0
    graph = traced(model)
    assert Part.calls == len(set(settings))
    assert {name for name, value in graph.graph.initializers.items() if value.const_value is None} == weights.keys()
    assert Counter(node.op_type for node in graph.graph)["Gemm"] == len(settings)
    for name, weight in weights.items():
        graph.graph.initializers[name].const_value = ir.tensor(weight.numpy(), name=name)
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-5, atol=1e-6)


def test_a_part_that_reads_more_than_its_inputs_is_found() -> None:
    class Reading(Part):
        def mix(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x + self.elsewhere, y

    class Holding(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                part.elsewhere = x
            return super().forward(x)

    with pytest.raises(AssertionError, match="past its inputs"):
        traced(Holding(Reading(1.0, 1.0), Reading(1.0, 1.0)))
