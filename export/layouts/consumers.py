"""What is written for other consumers than this project's runtime: their graphs, file names and configs.

optimum: one graph from token ids to logits, `model.onnx`, as optimum's `ORTModelForCausalLM` takes it.
transformers.js: the `onnx/` tree that its `Gemma3nForConditionalGeneration` loads, with a suffix for the precision.

Both keep KV caches outside, as tensors that grow by a token a step, for the layers that produce K and V only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from gemma3n_onnx.export.errors import ExportOptionError
from gemma3n_onnx.export.quantization.precision import Precision
from gemma3n_onnx.graphs.config import TextConfig
from gemma3n_onnx.graphs.passes.borrow_last import BorrowLast
from gemma3n_onnx.graphs.passes.name_axes import NameAxes
from gemma3n_onnx.graphs.passes.split_layers import SplitLayers
from gemma3n_onnx.graphs.passes.take_ids import TakeIds

NATIVE, OPTIMUM, TRANSFORMERS_JS = "native", "optimum", "transformers.js"
LAYOUTS = (NATIVE, OPTIMUM, TRANSFORMERS_JS)
# Of transformers.js, by precision: its name of the dtype, and what its files' names end in.
_JS_DTYPES = {"fp32": ("fp32", ""), "fp16": ("fp16", "_fp16"), "int8": ("q8", "_quantized"), "int4": ("q4", "_q4")}
_AXES = {
    "batch": "batch_size",
    "new_tokens": "sequence_length",
    "total_length": "total_sequence_length",
    "capacity": "past_sequence_length",
}
# In transformers the type of config that optimum reads `head_dim` and `num_key_value_heads` of.
_OPTIMUM_TYPE = "gemma3_text"


def check_layout(layout: str, precision: str, target: str, logits: str, modalities: tuple[str, ...] | None) -> None:
    """Raises ExportOptionError for a layout that there is not, or that has no place for something."""
    if layout not in LAYOUTS:
        raise ExportOptionError(f"Unknown layout {layout!r}; choose {', '.join(LAYOUTS)}.")
    if layout == NATIVE:
        return
    if target != "cpu" or logits != "last":
        raise ExportOptionError(f"--layout {layout} is for --target cpu and --logits last; leave these two out.")
    if layout == OPTIMUM and set(modalities or ()) - {"text"}:
        raise ExportOptionError("--layout optimum is for text; leave --modalities out.")
    if layout == TRANSFORMERS_JS and precision not in _JS_DTYPES:
        raise ExportOptionError(
            f"transformers.js has no name for precision {precision}; choose one of {', '.join(_JS_DTYPES)}."
        )


@dataclass(frozen=True)
class Layout:
    """`folder` holds graphs and weights, below the output; `files` are the graphs' names in it, of those that it has;
    `modalities` those that it takes, None for all."""

    name: str
    folder: str
    files: Mapping[str, str]
    modalities: tuple[str, ...] | None = None

    @property
    def native(self) -> bool:
        return self.name == NATIVE


def layout_of(name: str, precision: str) -> Layout:
    if name == OPTIMUM:
        return Layout(name, "", {"decoder": "model.onnx"}, ("text",))
    if name == TRANSFORMERS_JS:
        suffix = _JS_DTYPES[precision][1]
        names = {
            "decoder": "decoder_model_merged",
            "embedding": "embed_tokens",
            "vision": "vision_encoder",
            "audio": "audio_encoder",
        }
        return Layout(name, "onnx", {key: f"{graph}{suffix}.onnx" for key, graph in names.items()})
    names = {"decoder": "decoder", "prefill": "prefill", "embedding": "embedding", "candidates": "candidates"}
    names |= {modality: f"{modality}_encoder" for modality in ("vision", "audio")}
    return Layout(name, "", {key: f"{graph}.onnx" for key, graph in names.items()})


def adapt(layout: Layout, decoder: ir.Model, embedding: ir.Model, config: TextConfig) -> None:
    """The decoder, and where it stays a graph of its own the embedding, as the consumer takes them."""
    if not layout.native:
        BorrowLast()(decoder)  # their ONNX Runtime may be older than what this project's runtime asks for
    if layout.name == OPTIMUM:
        TakeIds(embedding)(decoder)
        NameAxes(_AXES)(decoder)
    if layout.name == TRANSFORMERS_JS:
        for model in (decoder, embedding):
            SplitLayers(config.num_layers)(model)
            NameAxes(_AXES)(model)


def configs_of(layout: Layout, config: dict[str, Any], precision: Precision) -> dict[str, dict[str, Any]]:
    """`config.json` of the consumer, from that of transformers, and what else it wants to be told, by file."""
    if layout.name == OPTIMUM:
        text = config.get("text_config", config)
        return {"config.json": {**text, "model_type": _OPTIMUM_TYPE, "architectures": ["Gemma3ForCausalLM"]}}
    if layout.name == TRANSFORMERS_JS:
        processor = {"processor_class": "Gemma3nProcessor"}
        counts = {"image_seq_length": "vision_soft_tokens_per_image", "audio_seq_length": "audio_soft_tokens_per_image"}
        return {
            "config.json": {**config, "transformers.js_config": {"dtype": _JS_DTYPES[precision.name][0]}},
            "processor_config.json": processor | {ours: config[key] for ours, key in counts.items() if key in config},
        }
    return {"config.json": config}
