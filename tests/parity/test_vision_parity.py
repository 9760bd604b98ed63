"""The vision encoder against timm's tower inside transformers, eager and traced, at every image size.

The full tower takes about 7 GB of memory and a few minutes: pytest -m full_size tests/parity/test_vision_parity.py -s
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import Gemma3nConfig, Gemma3nForConditionalGeneration

from gemma3n_onnx.export.trace import trace_vision
from gemma3n_onnx.graphs.vision import VisionConfig, VisionEncoder, checkpoint_shapes
from gemma3n_onnx.runtime.engine.ort import Session
from gemma3n_onnx.runtime.engine.providers.cpu import CPUProvider
from gemma3n_onnx.runtime.errors import ProviderError
from oracle import TOLERANCE, assert_close

# The last is odd at several stages: where the padding is uneven shows.
LARGEST = pytest.param(1, 768, 768, marks=pytest.mark.full_size)
CASES = [(1, 256, 256), (2, 256, 256), (1, 512, 512), LARGEST, (2, 256, 512), (1, 241, 250)]
TEXT = {"num_hidden_layers": 2, "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]}
TEXT |= {"vocab_size": 64, "vocab_size_per_layer_input": 64, "intermediate_size": 32, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 1, "head_dim": 8, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
TEXT |= {"activation_sparsity_pattern": [0.0, 0.0]}
AUDIO = {"hidden_size": 32, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 2}


@dataclass(frozen=True)
class Encoders:
    oracle: Gemma3nForConditionalGeneration
    module: VisionEncoder
    session: Session

    def check(self, images: int, height: int, width: int) -> None:
        pixels = torch.rand(images, 3, height, width, generator=torch.Generator().manual_seed(height))
        with torch.no_grad():
            theirs = self.oracle.get_image_features(pixels).pooler_output.flatten(0, 1).numpy()
            eager = self.module(pixels).numpy()
        traced = self.session.run({"pixel_values": pixels.numpy()})["image_features"]
        what = f"{images} x {height} x {width}"
        assert_close(f"{what}, eager", eager, theirs, TOLERANCE)
        assert_close(f"{what}, traced", traced, theirs, TOLERANCE)


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    """Every block of the full tower, narrow: 3.7 million parameters."""
    return make_encoders({"channel_multiplier": 0.03}, 64, tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encoders]:
    with TemporaryDirectory(dir=tmp_path_factory.mktemp("vision")) as folder:  # pytest would keep the files
        yield make_encoders(None, 2048, Path(folder))


@pytest.mark.parametrize(("images", "height", "width"), CASES)
def test_reduced_tower_equals_timm(reduced: Encoders, images: int, height: int, width: int) -> None:
    reduced.check(images, height, width)


@pytest.mark.full_size
@pytest.mark.parametrize(("images", "height", "width"), CASES)
def test_full_tower_equals_timm(full: Encoders, images: int, height: int, width: int) -> None:
    full.check(images, height, width)


@pytest.mark.parametrize("side", [128, 384, 640])
def test_sizes_whose_map_timm_would_resize_fail(reduced: Encoders, side: int) -> None:
    with pytest.raises(ProviderError):
        reduced.session.run({"pixel_values": np.zeros((1, 3, side, side), np.float32)})


def make_encoders(model_args: Mapping[str, float] | None, text_hidden_size: int, folder: Path) -> Encoders:
    """Oracle, module and graph with the same random weights."""
    hf_config = Gemma3nConfig(
        text_config=TEXT | {"hidden_size": text_hidden_size},
        vision_config={"model_args": model_args},
        audio_config=AUDIO,
    )
    config = VisionConfig.from_hf(hf_config.to_dict())
    weights = random_weights(config)

    oracle = Gemma3nForConditionalGeneration(hf_config).eval()
    for part in ("vision_tower", "embed_vision"):
        own = {name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(part)}
        getattr(oracle.model, part).load_state_dict(own, strict=True, assign=True)

    with torch.device("meta"):
        module = VisionEncoder(config).eval()
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    own = {name: value.reshape(shapes[name]) for name, value in weights.items()}
    module.load_state_dict(own, strict=True, assign=True)

    graph = trace_vision(config)
    for name, value in graph.graph.initializers.items():
        if value.const_value is None:
            value.const_value = ir.tensor(own[name].numpy(), name=name)
    ir.save(graph, folder / "vision_encoder.onnx", external_data="vision_encoder.onnx.data")
    return Encoders(oracle, module, Session(folder / "vision_encoder.onnx", CPUProvider()))


def random_weights(config: VisionConfig) -> dict[str, torch.Tensor]:
    """As a checkpoint names and shapes them. Convolutions keep magnitudes; norms, scales and biases are all felt."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in checkpoint_shapes(config).items():
        if len(shape) > 1:
            fan_in = int(np.prod(shape[1:]))
            weights[name] = torch.randn(shape, generator=generator) * fan_in**-0.5
        elif name.endswith("gamma"):
            weights[name] = torch.rand(shape, generator=generator) * 0.5 + 0.25
        elif name.endswith("bias"):
            weights[name] = torch.randn(shape, generator=generator) * 0.5
        else:
            weights[name] = torch.rand(shape, generator=generator) + 0.5
    return weights
