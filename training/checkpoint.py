"""The demo's configuration, and its trained weights as a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gemma3n_onnx.export.checkpoint.checkpoint import FULL_NAMING, WEIGHTS
from gemma3n_onnx.export.checkpoint.make_checkpoint import PREPROCESSOR, TINY_AUDIO, full_config, text_config
from gemma3n_onnx.export.checkpoint.make_tokenizer import write_tokenizer
from gemma3n_onnx.export.checkpoint.processor import log_mel_info
from gemma3n_onnx.export.writer import write_json
from gemma3n_onnx.graphs import audio, vision
from gemma3n_onnx.graphs.config import FULL, SLIDING

from .questions import corpus
from .vision import SIDE

# Of the layers that produce K and V one more than usual attends to everything: else no word of a question could take
# up what it asks about in a picture before others read its K and V.
TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 15,
    "num_kv_shared_layers": 10,
    "head_dim": 32,
    "sliding_window": 128,
    "laurel_rank": 16,
    "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL, *([SLIDING] * 4 + [FULL]) * 2],
    "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 13,
}
VISION: dict[str, Any] = {"model_args": {"channel_multiplier": 0.04}}
LOG_MEL = log_mel_info(PREPROCESSOR)


def demo_config() -> dict[str, Any]:
    """The `config.json`."""
    return full_config(*text_config("tiny", "bfloat16", TEXT), VISION, TINY_AUDIO)


def write_companions(folder: Path, config: Mapping[str, Any]) -> None:
    """All files of the checkpoint but its weights and what people wrote."""
    text = config["text_config"]
    write_json(folder / "config.json", dict(config))
    write_json(folder / "preprocessor_config.json", PREPROCESSOR | {"size": {"height": SIDE, "width": SIDE}})
    write_tokenizer(folder, text["vocab_size_per_layer_input"], text["vocab_size"], corpus())


def write_weights(
    folder: Path, config: Mapping[str, Any], text: Mapping[str, Tensor], encoders: Mapping[str, Tensor]
) -> None:
    """`text` by the names below the decoder's prefix, `encoders` by those below `model.`; stored in bf16."""
    shapes = {
        **vision.checkpoint_shapes(vision.VisionConfig.from_hf(config)),
        **audio.checkpoint_shapes(audio.AudioConfig.from_hf(config)),
    }
    named = {f"{FULL_NAMING.text}{name}": tensor for name, tensor in text.items()}
    named |= {f"{FULL_NAMING.encoders}{name}": encoders[name].reshape(shape) for name, shape in shapes.items()}
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in named.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
