"""What a traced graph must be, whatever its weights."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from gemma3n_onnx.export import trace
from gemma3n_onnx.export.checkpoint.sizes import E4B
from gemma3n_onnx.graphs import decoder, ops
from gemma3n_onnx.graphs.config import FULL, SLIDING, TextConfig
from gemma3n_onnx.graphs.embedding import HardRows
from gemma3n_onnx.graphs.shapes import parameter_shapes

CONFIG = dataclasses.replace(
    E4B,
    vocab_size=96,
    vocab_size_per_layer_input=64,
    hidden_size=32,
    hidden_size_per_layer_input=16,
    intermediate_sizes=(64, 64, 32, 64),
    num_heads=4,
    head_dim=8,
    layer_types=(SLIDING, FULL, SLIDING, FULL),
    num_kv_shared_layers=2,
    activation_sparsity=(0.9, 0.0, 0.0, 0.0),
    sliding_window=8,
    laurel_rank=4,
)


def nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


@pytest.fixture(scope="module")
def model() -> ir.Model:
    return trace.trace_decoder(CONFIG, "last", "fp32")


def test_every_parameter_is_an_initializer_without_data(model: ir.Model) -> None:
    shapes = parameter_shapes(CONFIG)
    without_data = {
        name: tuple(value.shape.numpy())
        for name, value in model.graph.initializers.items()
        if value.const_value is None and value.shape is not None
    }
    assert without_data == shapes


@pytest.mark.parametrize("config", [CONFIG, E4B], ids=["small", "E4B"])
def test_the_shapes_are_those_of_the_module(config: TextConfig) -> None:
    with torch.device("meta"):
        module = decoder.Decoder(config, "last")
    assert [*parameter_shapes(config).items()] == [(n, tuple(p.shape)) for n, p in module.named_parameters()]


def test_only_producing_layers_have_caches(model: ir.Model) -> None:
    past = [value.name for value in model.graph.inputs if value.name.startswith("past")]
    assert past == [f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")]


def test_shared_layers_read_their_donor_and_declare_one_output(model: ir.Model) -> None:
    attention = nodes(model, "GroupQueryAttention")
    assert [len([o for o in node.outputs if o.name]) for node in attention] == [3, 3, 1, 1]
    for reader, donor in zip(attention[2:], attention[:2]):
        assert list(reader.inputs[3:5]) == list(donor.outputs[1:3])


def test_windows_and_windowed_caches_follow_the_layer_types(model: ir.Model) -> None:
    attention = nodes(model, "GroupQueryAttention")
    windows = [node.attributes["local_window_size"].as_int() for node in attention]
    assert windows == [8, -1, 8, -1]
    windowed = ["sliding_window_cache" in node.attributes for node in attention]
    assert windowed == [True, False, False, False]


def test_all_logits_keep_the_sliding_donor_full() -> None:
    specs = decoder.cache_specs(CONFIG, "all")
    assert [spec.windowed for spec in specs] == [False, False]
    assert [spec.windowed for spec in decoder.cache_specs(CONFIG, "last")] == [True, False]


def described(model: ir.Model) -> tuple[list[str], dict[str, str]]:
    graph = model.graph
    nodes = [str(node) for node in graph]
    values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
    return nodes, {value.name: f"{value.dtype} {value.shape} {value.const_value}" for value in values}


def test_a_shared_trace_is_the_one_that_the_config_alone_gives(model: ir.Model) -> None:
    before = described(model)
    other = dataclasses.replace(
        CONFIG,
        intermediate_sizes=(96, 96, 96, 96),
        vocab_size=320,
        vocab_size_per_layer_input=96,
        max_position_embeddings=77,
        tied_head=False,
    )
    shared = trace.trace_decoder(other, "last", "fp32")
    assert tuple(shared.graph.initializers["layers.1.mlp.down_proj.weight"].shape.numpy()) == (32, 96)
    assert shared.graph.outputs[0].shape[2] == 320
    assert described(shared) == described(trace._trace_decoder.__wrapped__.__wrapped__(other, "last", "fp32", True))
    assert described(model) == before


def test_a_fixed_size_in_a_graph_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GEMMA3N_CACHE", str(tmp_path))
    monkeypatch.setattr(ops, "count_to", lambda size: torch.arange(size.number))
    trace._trace_decoder.cache_clear()
    with pytest.raises(AssertionError, match=str(1009 * 2003)):
        trace.trace_decoder(CONFIG, "last", "fp32")
    trace._trace_decoder.cache_clear()


def test_a_vocabulary_may_have_a_size_that_a_traced_one_divides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GEMMA3N_CACHE", str(tmp_path))
    config = dataclasses.replace(CONFIG, vocab_size=2 * 1009, vocab_size_per_layer_input=1009)
    assert trace.trace_decoder(config, "all", "fp32").graph.outputs[0].shape == ["batch", "new_tokens", 2018]
    embedding = trace.trace_embedding(config, "fp32", "fp32", HardRows(1009, 1009))
    assert embedding.graph.initializers["embed_tokens.weight"].shape == [3 * 1009, 32]


def test_half_precision_computes_rope_magnitudes_and_gates_in_fp32() -> None:
    half = trace.trace_decoder(CONFIG, "last", "fp16")
    inputs = {value.name: value.dtype for value in half.graph.inputs}
    assert inputs["inputs_embeds"] == inputs["past_key_values.0.key"] == ir.DataType.FLOAT16
    frequencies = [v for n, v in half.graph.initializers.items() if n.startswith("inverse_frequency")]
    assert {value.dtype for value in frequencies} == {ir.DataType.FLOAT}
    assert half.graph.outputs[0].dtype == ir.DataType.FLOAT


@pytest.mark.parametrize("window", [4, 8])
def test_resident_length_in_the_graph_is_the_runtimes(window: int) -> None:
    from gemma3n_onnx.runtime.engine.kv_window import resident_length

    seen = torch.arange(1, 200)
    for capacity in (window, window + 1, window + 7, 3 * window):
        graph = decoder._resident_length(seen, torch.tensor([capacity]), window)
        expected = [resident_length(int(t), capacity, window) for t in seen]
        np.testing.assert_array_equal(graph.numpy(), expected)


def test_config_refuses_what_the_graph_cannot_do() -> None:
    from gemma3n_onnx.graphs.config import ConfigError

    with pytest.raises(ConfigError, match="no donor"):
        dataclasses.replace(CONFIG, layer_types=(FULL, FULL, SLIDING, FULL))
    with pytest.raises(ConfigError, match="not a Gemma 3n"):
        TextConfig.from_hf({"model_type": "gemma3_text"})
    with pytest.raises(ConfigError, match="3 entries"):
        dataclasses.replace(CONFIG, intermediate_sizes=(64, 64, 64))


@pytest.mark.parametrize("storage", ["fp16", "bf16"])
def test_narrow_tables_are_widened_row_by_row(storage: str) -> None:
    embedding = trace.trace_embedding(CONFIG, storage, "fp32")
    for node in nodes(embedding, "Cast"):
        assert node.inputs[0].producer().op_type == "Gather"
    assert [value.dtype for value in embedding.graph.outputs] == [ir.DataType.FLOAT] * 2


def test_narrow_weights_are_widened_where_they_are_used() -> None:
    from gemma3n_onnx.graphs.passes.store_narrow import StoreNarrow

    stored = trace.trace_decoder(CONFIG, "last", "fp32")
    shapes = parameter_shapes(CONFIG)
    assert StoreNarrow(set(shapes), ir.DataType.BFLOAT16)(stored).modified
    for name in shapes:
        value = stored.graph.initializers[name]
        assert value.dtype == ir.DataType.BFLOAT16
        assert {node.op_type for node in value.consumers()} == {"Cast"}
    assert not StoreNarrow(set(), ir.DataType.BFLOAT16)(stored).modified
    again = trace.trace_decoder(CONFIG, "last", "fp32")
    assert {again.graph.initializers[name].dtype for name in shapes} == {ir.DataType.FLOAT}
