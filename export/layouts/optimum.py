"""optimum's `ORTModelForCausalLM`: one graph, `model.onnx`, from token ids to logits. Text only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gemma3n_onnx.export.errors import ExportOptionError
from gemma3n_onnx.graphs.config import TextConfig
from gemma3n_onnx.runtime.artifact import Manifest

from .base import ConfigFiles, Requested
from .growing_cache import AXES, GrowingCacheLayout

if TYPE_CHECKING:
    import onnx_ir as ir

# The `model_type` for which optimum reads `head_dim` and `num_key_value_heads` from the config.
_MODEL_TYPE = "gemma3_text"


class OptimumLayout(GrowingCacheLayout):
    name = "optimum"
    marker = "model.onnx"
    modalities = ("text",)

    def check(self, requested: Requested) -> None:
        super().check(requested)
        if set(requested.modalities or ()) - {"text"}:
            raise ExportOptionError(f"--layout {self.name} is text-only; leave --modalities out.")

    def graph_files(self, precision: str) -> Mapping[str, str]:
        return {"decoder": "model.onnx"}

    def adapt(self, decoder: ir.Model, embedding: ir.Model, config: TextConfig) -> None:
        from gemma3n_onnx.graphs.passes.fuse_embedding import FuseEmbedding
        from gemma3n_onnx.graphs.passes.name_axes import NameAxes

        super().adapt(decoder, embedding, config)
        FuseEmbedding(embedding)(decoder)
        NameAxes(AXES)(decoder)

    def config_files(self, model_config: Mapping[str, Any], manifest: Manifest, config: TextConfig) -> ConfigFiles:
        text = model_config.get("text_config", model_config)
        return {"config.json": {**text, "model_type": _MODEL_TYPE, "architectures": ["Gemma3ForCausalLM"]}}
