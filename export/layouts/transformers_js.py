"""transformers.js' `Gemma3nForConditionalGeneration`: the `onnx/` folder, with the dtype as a suffix of file names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma3n_onnx.export.errors import ExportOptionError
from gemma3n_onnx.graphs.config import TextConfig
from gemma3n_onnx.runtime.artifact import Manifest

from .base import ConfigFiles, Requested
from .growing_cache import AXES, GrowingCacheLayout

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class _Dtype:
    name: str
    suffix: str


# transformers.js' dtypes, by precision.
_DTYPES = {
    "fp32": _Dtype("fp32", ""),
    "fp16": _Dtype("fp16", "_fp16"),
    "int8": _Dtype("q8", "_quantized"),
    "int4": _Dtype("q4", "_q4"),
}
_GRAPHS = {
    "decoder": "decoder_model_merged",
    "embedding": "embed_tokens",
    "vision": "vision_encoder",
    "audio": "audio_encoder",
}
# Keys of processor_config.json, and the config.json keys that they repeat.
_SOFT_TOKEN_COUNTS = {
    "image_seq_length": "vision_soft_tokens_per_image",
    "audio_seq_length": "audio_soft_tokens_per_image",
}


class TransformersJsLayout(GrowingCacheLayout):
    name = "transformers.js"
    marker = "onnx/decoder_model_merged*.onnx"
    folder = "onnx"

    def check(self, requested: Requested) -> None:
        super().check(requested)
        if requested.precision not in _DTYPES:
            raise ExportOptionError(
                f"{self.name} does not support precision {requested.precision}; choose one of {', '.join(_DTYPES)}."
            )

    def graph_files(self, precision: str) -> Mapping[str, str]:
        return {graph: f"{name}{_DTYPES[precision].suffix}.onnx" for graph, name in _GRAPHS.items()}

    def adapt(self, decoder: ir.Model, embedding: ir.Model, config: TextConfig) -> None:
        from gemma3n_onnx.graphs.passes.name_axes import NameAxes
        from gemma3n_onnx.graphs.passes.split_layers import SplitLayers

        super().adapt(decoder, embedding, config)
        for model in (decoder, embedding):
            SplitLayers(config.num_layers)(model)
            NameAxes(AXES)(model)

    def config_files(self, model_config: Mapping[str, Any], manifest: Manifest, config: TextConfig) -> ConfigFiles:
        counts = {ours: model_config[key] for ours, key in _SOFT_TOKEN_COUNTS.items() if key in model_config}
        return {
            "config.json": {**model_config, "transformers.js_config": {"dtype": _DTYPES[manifest.precision].name}},
            "processor_config.json": {"processor_class": "Gemma3nProcessor", **counts},
        }
