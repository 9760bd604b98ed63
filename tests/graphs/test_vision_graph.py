"""The vision encoder's parameters and graph, whatever its weights."""

import copy
import dataclasses
import math
from typing import Any

import onnx_ir as ir
import pytest
import timm
import torch

from gemma3n_onnx.export import trace
from gemma3n_onnx.export.checkpoint.sizes import VISION_TOWER_PARAMETERS
from gemma3n_onnx.graphs.config import ConfigError
from gemma3n_onnx.graphs.vision import ARCHITECTURE, TOWER, VisionConfig, checkpoint_shapes

HF_CONFIG: dict[str, Any] = {
    "model_type": "gemma3n",
    "vision_soft_tokens_per_image": 256,
    "text_config": {"hidden_size": 64},
    "vision_config": {
        "architecture": "mobilenetv5_300m_enc",
        "do_pooling": False,
        "hidden_size": 2048,
        "vocab_size": 128,
        "vocab_offset": 262144,
        "rms_norm_eps": 1e-06,
        "model_args": {"channel_multiplier": 0.03},
    },
}
REDUCED = VisionConfig.from_hf(HF_CONFIG)
FULL = dataclasses.replace(REDUCED, channel_multiplier=1.0, text_hidden_size=2048)
HEIGHT = trace.AXES["height"]


@pytest.fixture(scope="module")
def model() -> ir.Model:
    return trace.trace_vision(REDUCED)


@pytest.mark.parametrize("multiplier", [1.0, 0.5, 0.1, 0.03])
def test_the_tensors_are_those_of_timm(multiplier: float) -> None:
    with torch.device("meta"):
        tower = timm.create_model("mobilenetv5_300m_enc", channel_multiplier=multiplier)
    ours = checkpoint_shapes(dataclasses.replace(FULL, channel_multiplier=multiplier))
    assert {name: shape for name, shape in ours.items() if name.startswith(TOWER)} == {
        TOWER + name: tuple(value.shape) for name, value in tower.state_dict().items()
    }


def test_the_full_encoder_has_the_published_size() -> None:
    shapes = checkpoint_shapes(FULL)
    tower = [shape for name, shape in shapes.items() if name.startswith(TOWER)]
    assert len(tower) == 548
    assert sum(map(math.prod, tower)) == VISION_TOWER_PARAMETERS[ARCHITECTURE]
    assert {name: shape for name, shape in shapes.items() if not name.startswith(TOWER)} == {
        "embed_vision.embedding.weight": (128, 2048),
        "embed_vision.hard_embedding_norm.weight": (2048,),
        "embed_vision.soft_embedding_norm.weight": (2048,),
        "embed_vision.embedding_projection.weight": (2048, 2048),
    }


def test_images_height_and_width_vary(model: ir.Model) -> None:
    (pixels,), (features,) = model.graph.inputs, model.graph.outputs
    assert (pixels.name, str(pixels.shape)) == ("pixel_values", "[images,3,height,width]")
    assert (features.name, str(features.shape)) == ("image_features", "[image_tokens,64]")


def test_every_parameter_but_the_hard_embeddings_is_an_initializer(model: ir.Model) -> None:
    held = {name for name, value in model.graph.initializers.items() if value.const_value is None}
    unused = {"embed_vision.embedding.weight", "embed_vision.hard_embedding_norm.weight"}
    assert held == checkpoint_shapes(REDUCED).keys() - unused


def test_weights_are_used_as_the_checkpoint_lays_them_out(model: ir.Model) -> None:
    """So that none is copied when a session maps the data file."""
    shapes = checkpoint_shapes(REDUCED)
    for name, value in model.graph.initializers.items():
        if value.const_value is None and len(shapes[name]) > 1:
            assert value.shape is not None
            assert math.prod(value.shape.numpy()) == math.prod(shapes[name])
            assert {node.op_type for node in value.consumers()} <= {"Gemm", "Conv"}


@pytest.mark.parametrize("size", [HEIGHT, HEIGHT // 2, HEIGHT // 32, HEIGHT // 256, 16 * HEIGHT * HEIGHT])
def test_a_fixed_height_in_a_graph_is_found(model: ir.Model, size: int) -> None:
    spoiled = model.clone()
    spoiled.graph.register_initializer(ir.Value(name="size", const_value=ir.tensor([-1, size], name="size")))
    with pytest.raises(AssertionError, match=str(size)):
        trace._check_no_size_is_fixed(spoiled)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": None}, "no vision_config"),
        ({"vision_config.architecture": "resnet50"}, "'resnet50'; only 'mobilenetv5_300m_enc'"),
        ({"vision_config.do_pooling": True}, "do_pooling"),
        ({"vision_config.model_args": {"pad_type": ""}}, "other keys than channel_multiplier"),
        ({"vision_config.model_args": {"channel_multiplier": 0}}, "channel_multiplier is 0;"),
        ({"vision_config.model_args": {"channel_multiplier": "half"}}, "channel_multiplier is 'half'"),
        ({"vision_config.hidden_size": 0}, "hidden_size is 0"),
        ({"vision_config.vocab_size": ...}, "no 'vocab_size'"),
        ({"text_config": {}}, "no 'hidden_size'"),
        ({"vision_soft_tokens_per_image": 64}, "vision_soft_tokens_per_image is 64"),
    ],
)
def test_config_refuses_what_the_graph_cannot_do(changes: dict[str, Any], message: str) -> None:
    config = copy.deepcopy(HF_CONFIG)
    for path, value in changes.items():
        *parents, key = path.split(".")
        place = config[parents[0]] if parents else config
        if value is ...:
            del place[key]
        else:
            place[key] = value
    with pytest.raises(ConfigError, match=message):
        VisionConfig.from_hf(config)
