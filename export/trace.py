"""Traces torch modules to ONNX graphs under fake tensors: no weight is allocated.

The only user of `torch.onnx`. A traced graph has one initializer without data for each parameter, with the
parameter's name; `export.weights` points it to a data file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes import Sequential
from onnx_ir.passes import common as passes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from gemma3n_onnx.export.repeat import repeat_parts
from gemma3n_onnx.export.trace_cache import kept_on_disk
from gemma3n_onnx.graphs import names
from gemma3n_onnx.graphs.audio import AudioConfig, AudioEncoder
from gemma3n_onnx.graphs.config import Logits, TextConfig
from gemma3n_onnx.graphs.decoder import Decoder
from gemma3n_onnx.graphs.embedding import Embedding, HardRows
from gemma3n_onnx.graphs.repeated import one_of_each
from gemma3n_onnx.graphs.vision import VisionConfig, VisionEncoder

OPSET = 23
# Sizes of the dynamic axes while tracing: primes that do not divide any model dimension.
AXES = {
    names.BATCH: 1009,
    names.NEW_TOKENS: 2003,
    names.TOTAL_LENGTH: 4001,
    names.WINDOW_CAPACITY: 7001,
    names.CAPACITY: 8009,
    names.rows_of(names.IMAGE_FEATURES): 9001,
    names.rows_of(names.AUDIO_FEATURES): 9007,
    "images": 1013,
    "height": 256 * 10007,
    "width": 256 * 10009,
    "clips": 1511,
    "frames": 48 * 2161 - 5,
}
# Height and width at the lowest resolution of the vision encoder.
_IMAGE_SIZES = (10007, 10009)
# Sizes that the audio encoder derives from its frames: the steps, and the chunks of 12 steps.
_AUDIO_SIZES = (12 * 2161 - 1, 2161)
_AXIS_NAMES = {size: name for name, size in AXES.items()}

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def trace_decoder(config: TextConfig, logits: Logits, compute: str, windows: bool = True) -> ir.Model:
    """The decoder graph, dynamic in batch, new tokens, mask length and cache capacities.

    `compute` is the dtype of weights and activations, a key of `DTYPES`; `windows` as in `cache_specs`.
    """
    model = _trace_decoder(_shared(config), logits, compute, windows).clone()
    for name, shape in _own_shapes(config).items():
        model.graph.initializers[name].shape = ir.Shape(shape)
    output = model.graph.outputs[0]
    assert output.shape is not None
    output.shape = ir.Shape([*output.shape[:2], config.vocab_size])
    return model


def trace_embedding(
    config: TextConfig,
    storage: str,
    compute: str,
    hard_rows: HardRows | None = None,
    soft_token_ids: Mapping[str, int] = MappingProxyType({}),
) -> ir.Model:
    """The embedding graph: token ids to scaled token embeddings and PLE rows, with tables of dtype `storage`.

    `soft_token_ids` maps a feature input to the soft token that it replaces.
    """
    shared = dataclasses.replace(
        _shared(config), vocab_size=config.vocab_size, vocab_size_per_layer_input=config.vocab_size_per_layer_input
    )
    return _trace_embedding(shared, storage, compute, hard_rows, tuple(soft_token_ids.items())).clone()


def trace_audio(config: AudioConfig) -> ir.Model:
    """The audio encoder graph in fp32, dynamic in clips and mel frames; inputs are those of `AudioEncoder.forward`."""
    return _trace_audio(config).clone()


def trace_vision(config: VisionConfig) -> ir.Model:
    """The vision encoder graph in fp32, dynamic in images, height and width (multiples of 256)."""
    return _trace_vision(config).clone()


def _shared(config: TextConfig) -> TextConfig:
    """The config with fixed values where a decoder's nodes depend on none: slices of one depth and checkpoints with
    added tokens share a trace."""
    return dataclasses.replace(
        config,
        intermediate_sizes=(32,) * config.num_layers,
        vocab_size=32,
        vocab_size_per_layer_input=32,
        max_position_embeddings=32,
        tied_head=True,
    )


def _own_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that are others in the shared config."""
    shapes: dict[str, tuple[int, ...]] = {"lm_head.weight": (config.vocab_size, config.hidden_size)}
    for i, width in enumerate(config.intermediate_sizes):
        for name, shape in (("gate", (width, config.hidden_size)), ("up", (width, config.hidden_size)),
                            ("down", (config.hidden_size, width))):  # fmt: skip
            shapes[f"layers.{i}.mlp.{name}_proj.weight"] = shape
    return shapes


@functools.lru_cache(maxsize=8)
@kept_on_disk
def _trace_decoder(config: TextConfig, logits: Logits, compute: str, windows: bool) -> ir.Model:
    with torch.device("meta"):
        outline = Decoder(config, logits, windows)
        batch, new, length = (AXES[name] for name in (names.BATCH, names.NEW_TOKENS, names.TOTAL_LENGTH))
        per_layer = config.num_layers * config.hidden_size_per_layer_input
        heads, dim, dtype = config.num_kv_heads, config.head_dim, DTYPES[compute]
        rows = [AXES[names.WINDOW_CAPACITY if cache.windowed else names.CAPACITY] for cache in outline.caches]
        arguments = (
            torch.empty(batch, new, config.hidden_size, dtype=dtype),
            torch.empty(batch, new, per_layer, dtype=dtype),
            torch.empty(batch, length, dtype=torch.int64),
            torch.empty(batch, new, dtype=torch.int64),
            [torch.empty(batch, heads, n, dim, dtype=dtype) for n in rows for _ in range(2)],
        )
    inputs, outputs = outline.input_names, outline.output_names
    return _trace(lambda: Decoder(config, logits, windows), compute, arguments, inputs, outputs)


@functools.lru_cache(maxsize=8)
@kept_on_disk
def _trace_embedding(
    config: TextConfig, storage: str, compute: str, hard_rows: HardRows | None, soft_tokens: tuple[tuple[str, int], ...]
) -> ir.Model:
    with torch.device("meta"):
        ids = torch.zeros(AXES[names.BATCH], AXES[names.NEW_TOKENS], dtype=torch.int64)
        features = [torch.empty(AXES[names.rows_of(name)], config.hidden_size) for name, _ in soft_tokens]
    inputs = [names.INPUT_IDS, *(name for name, _ in soft_tokens)]
    outputs = [names.INPUTS_EMBEDS, names.PER_LAYER_INPUTS]
    token_ids = tuple(token_id for _, token_id in soft_tokens)
    known = {config.vocab_size_per_layer_input, *token_ids}
    if hard_rows is not None:
        known |= {hard_rows.first_id, hard_rows.count}
    return _trace(
        lambda: Embedding(config, DTYPES[compute], hard_rows, token_ids),
        storage,
        (ids, features),
        inputs,
        outputs,
        known,
    )


@functools.lru_cache(maxsize=8)
@kept_on_disk
def _trace_audio(config: AudioConfig) -> ir.Model:
    clips, frames = AXES["clips"], AXES["frames"]
    arguments = (
        torch.empty(clips, frames, config.mel_bins, device="meta"),
        torch.empty(clips, frames, dtype=torch.bool, device="meta"),
    )
    inputs = [names.INPUT_FEATURES, names.INPUT_FEATURES_MASK]
    model = _trace(lambda: AudioEncoder(config), "fp32", arguments, inputs, [names.AUDIO_FEATURES])
    model.graph.outputs[0].shape = ir.Shape(["audio_tokens", config.text_hidden_size])
    return model


@functools.lru_cache(maxsize=2)
@kept_on_disk
def _trace_vision(config: VisionConfig) -> ir.Model:
    pixels = torch.empty(AXES["images"], 3, AXES["height"], AXES["width"], device="meta")
    model = _trace(lambda: VisionEncoder(config), "fp32", (pixels,), [names.PIXEL_VALUES], [names.IMAGE_FEATURES])
    model.graph.outputs[0].shape = ir.Shape(["image_tokens", config.text_hidden_size])
    return model


def _trace(
    build: Callable[[], nn.Module],
    weights: str,
    arguments: tuple,
    inputs: list[str],
    outputs: list[str],
    known: Collection[int] = (),
) -> ir.Model:
    """Traces a module with parameters of dtype `weights` on meta `arguments`; `AXES` sizes their dynamic axes.

    `known` are sizes of the module's own that a user may choose, such as that of a vocabulary: they may be constants of
    the graph even if a traced size divides them.
    """
    dtype = DTYPES[weights]
    with torch.device("meta"):
        module = build().eval()
    parameters = [name for name, _ in module.named_parameters()]
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and not name.startswith("inverse_frequency"):
                part._buffers[name] = buffer.to(dtype)
    with one_of_each(module) as kinds, FakeTensorMode(allow_non_fake_inputs=True), _quiet():
        for part in module.modules():
            for name, weight in part._parameters.items():
                assert weight is not None
                part._parameters[name] = nn.Parameter(torch.empty(weight.shape, dtype=dtype), requires_grad=False)
        program = torch.onnx.export(
            module,
            tree_map(lambda x: torch.empty(x.shape, dtype=x.dtype), arguments),
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            verbose=False,
        )
    assert program is not None
    model = program.model
    repeat_parts(model, kinds)
    _forget_sizes(model)
    _simplify(model, _without_unread(model.graph, parameters))
    _check_no_size_is_fixed(model, known)
    return model


def _without_unread(graph: ir.Graph, parameters: Sequence[str]) -> list[str]:
    """Removes unread parameters from the graph, and returns the others."""
    for name in parameters:
        if name in graph.initializers and not graph.initializers[name].uses():
            del graph.initializers[name]
    return [name for name in parameters if name in graph.initializers]


def _forget_sizes(model: ir.Model) -> None:
    """Names the dynamic axes of inputs and outputs, and drops the shapes of all other values."""
    graph = model.graph
    for value in (*graph.inputs, *graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape([_AXIS_NAMES.get(size, size) for size in value.shape.numpy()])
    for node in graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in graph.outputs:
                value.shape = None


def _check_no_size_is_fixed(model: ir.Model, known: Collection[int] = ()) -> None:
    """Fails on a traced size among the integer constants but `known` ones: a module used a torch view."""
    sizes = (*AXES.values(), *_AUDIO_SIZES, *_IMAGE_SIZES)
    values = [*model.graph.initializers.values(), *(output for node in model.graph for output in node.outputs)]
    for value in values:
        constant = ir.convenience.get_const_tensor(value)
        if constant is not None and constant.dtype == ir.DataType.INT64:
            for number in (*constant.shape.numpy(), *constant.numpy().flatten().tolist()):
                if number and number not in known and any(number % size == 0 for size in sizes):
                    users = sorted({node.op_type for node in value.consumers()})
                    raise AssertionError(f"The traced size {number} is a constant in {value.name}, used by {users}.")


def _simplify(model: ir.Model, parameters: list[str]) -> None:
    """Folds constants. Parameters are graph inputs for the duration, because they have no data to fold."""
    graph = model.graph
    held = []
    for name in parameters:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
        held.append(value)
    onnxscript.optimizer.fold_constants(model)
    Sequential(
        passes.IdentityEliminationPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
    )(model)
    for value in held:
        graph.inputs.remove(value)
        graph.initializers[value.name] = value  # type: ignore[index]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences output of torch.onnx that does not concern these graphs (torchvision, axis names)."""
    root = logging.getLogger("torch.onnx")
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
