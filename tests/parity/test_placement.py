"""The graphs for CUDA have a kernel for every node, and no value for which host and device wait for each other."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from gemma3n_onnx.export import operator_placement as placement
from gemma3n_onnx.export import slicing, trace
from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.export.checkpoint.make_checkpoint import text_config
from gemma3n_onnx.graphs.passes.choose_likeliest import ChooseLikeliest

DEMO = Path(__file__).parents[2] / "demo"


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int4"])
def test_an_exported_decoder_stays_on_the_device(shallow_checkpoint, exported, precision):
    folder = exported(shallow_checkpoint, precision=precision, target="cuda")
    for name in ("decoder", "candidates"):
        assert placement.complaints(ir.load(folder / f"{name}.onnx")) == []


@pytest.mark.full_size
@pytest.mark.parametrize("name", ["E4B", "E2B"])
def test_the_demos_decoder_stays_on_the_device(name):
    checkpoint = Checkpoint.open(DEMO)
    table = slicing.load_slices(None, checkpoint.slice_table)
    config = slicing.resolve(slicing.find_slice(name, table), checkpoint.text_config).config
    assert placement.complaints(decoder(config)) == []


@pytest.mark.full_size
def test_e2bs_decoder_stays_on_the_device():
    _, config = text_config("e2b", "bf16", {})
    model = decoder(config)
    assert sum(node.op_type == "GroupQueryAttention" for node in model.graph) == 30
    assert placement.complaints(model) == []


def decoder(config) -> ir.Model:
    model = trace.trace_decoder(config, "last", "bf16", windows=False)
    ChooseLikeliest()(model)
    return model


def test_what_windows_of_caches_would_cost_is_found(small_checkpoint):
    """The resident length of a window is known to the device, and attention wants it on the host."""
    told = placement.complaints(trace.trace_decoder(Checkpoint.open(small_checkpoint).text_config, "last", "bf16"))
    assert any("on the host, which the device makes" in complaint for complaint in told)
    assert any("on the device, which the host makes" in complaint for complaint in told)


def test_an_operator_without_a_kernel_is_named():
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.DOUBLE), shape=ir.Shape([2]))
    node = ir.node("Erf", [x], name="somewhere")
    node.outputs[0].type = ir.TensorType(ir.DataType.DOUBLE)
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 23}), ir_version=10)
    assert placement.complaints(model) == ["somewhere has no kernel for the device: ai.onnx Erf DOUBLE > DOUBLE"]
