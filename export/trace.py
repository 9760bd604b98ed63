"""Torch modules to ONNX graphs, under fake tensors: no weight exists while a graph is made.

The only user of `torch.onnx`. A graph leaves here with one initializer for each parameter, under the
parameter's name and without data; `export.weights` gives each its place in a data file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator

import onnx_ir as ir
import onnxscript.optimizer
import torch
from gemma3n_onnx.graphs.config import TextConfig
from gemma3n_onnx.graphs.decoder import Decoder, Logits
from gemma3n_onnx.graphs.embedding import Embedding
from onnx_ir.passes import Sequential
from onnx_ir.passes import common as passes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

OPSET = 23
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def trace_decoder(config: TextConfig, logits: Logits, compute: str) -> ir.Model:
    """The decoder graph, dynamic in batch, new tokens, mask length and cache capacities.

    `compute` is the dtype of weights and activations, a key of `DTYPES`.
    """
    # The nodes are the same for every FFN width: slices of one depth share one trace.
    narrow = dataclasses.replace(config, intermediate_sizes=(32,) * config.num_layers)
    model = _trace_decoder(narrow, logits, compute).clone()
    for i, width in enumerate(config.intermediate_sizes):
        shapes = {"gate_proj": (width, config.hidden_size), "down_proj": (config.hidden_size, width)}
        shapes["up_proj"] = shapes["gate_proj"]
        for name, shape in shapes.items():
            model.graph.initializers[f"layers.{i}.mlp.{name}.weight"].shape = ir.Shape(shape)
    return model


def trace_embedding(config: TextConfig, compute: str) -> ir.Model:
    """The embedding graph: ids to scaled token embeddings and PLE rows."""
    tokens = {0: Dim("batch"), 1: Dim("new_tokens")}
    return _trace(
        lambda: Embedding(config),
        compute,
        lambda _: (torch.zeros(2, 5, dtype=torch.int64),),
        (tokens,),
        ["input_ids"],
        ["inputs_embeds", "per_layer_inputs"],
    )


def parameter_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the decoder graph, in the order in which the layers use them."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Decoder(config, "last").named_parameters()}


@functools.lru_cache(maxsize=8)
def _trace_decoder(config: TextConfig, logits: Logits, compute: str) -> ir.Model:
    with torch.device("meta"):
        outline = Decoder(config, logits)
    batch, new, length = Dim("batch"), Dim("new_tokens"), Dim("total_length")
    capacity = {True: Dim("window_capacity"), False: Dim("capacity")}
    rows = {True: 4 * config.sliding_window, False: 4 * config.sliding_window + 16}
    per_layer = config.num_layers * config.hidden_size_per_layer_input

    def arguments(dtype: torch.dtype) -> tuple:
        past = [
            torch.zeros(2, config.num_kv_heads, rows[cache.windowed], config.head_dim, dtype=dtype)
            for cache in outline.caches
            for _ in range(2)
        ]
        return (
            torch.zeros(2, 5, config.hidden_size, dtype=dtype),
            torch.zeros(2, 5, per_layer, dtype=dtype),
            torch.ones(2, 9, dtype=torch.int64),
            torch.zeros(2, 5, dtype=torch.int64),
            past,
        )

    tokens = {0: batch, 1: new}
    past_shapes = [{0: batch, 2: capacity[cache.windowed]} for cache in outline.caches for _ in range(2)]
    shapes = (tokens, tokens, {0: batch, 1: length}, tokens, past_shapes)
    return _trace(
        lambda: Decoder(config, logits), compute, arguments, shapes, outline.input_names, outline.output_names
    )


def _trace(
    build: Callable[[], nn.Module],
    compute: str,
    arguments: Callable[[torch.dtype], tuple],
    shapes: tuple,
    inputs: list[str],
    outputs: list[str],
) -> ir.Model:
    dtype = DTYPES[compute]
    with torch.device("meta"):
        module = build().eval()
    parameters = [name for name, _ in module.named_parameters()]
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and not name.startswith("inverse_frequency"):
                part._buffers[name] = buffer.to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), _quiet():
        for part in module.modules():
            for name, weight in part._parameters.items():
                assert weight is not None
                fake = torch.empty(weight.shape, dtype=dtype)
                part._parameters[name] = nn.Parameter(fake, requires_grad=False)
        program = torch.onnx.export(
            module,
            arguments(dtype),
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            input_names=inputs,
            output_names=outputs,
            verbose=False,
        )
    assert program is not None
    _simplify(program.model, parameters)
    return program.model


def _simplify(model: ir.Model, parameters: list[str]) -> None:
    """Folds constants. Parameters pass as graph inputs meanwhile: they have no data to fold."""
    graph = model.graph
    held = []
    for name in parameters:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
        held.append(value)
    with _quiet():
        onnxscript.optimizer.optimize(model, onnx_shape_inference=False)
    Sequential(passes.CommonSubexpressionEliminationPass(), passes.RemoveUnusedNodesPass())(model)
    for value in held:
        graph.inputs.remove(value)
        graph.initializers[value.name] = value  # type: ignore[index]
    for node in graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in graph.outputs:
                value.shape = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints and warns about what is not ours to change (torchvision, axis names)."""
    root = logging.getLogger("torch.onnx")
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
