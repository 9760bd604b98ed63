"""The layout of this project's runtime, which onnxruntime-genai loads too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma3n_onnx.graphs.config import TextConfig
from gemma3n_onnx.runtime.artifact import MANIFEST, Manifest

from .base import ConfigFiles, Layout
from .genai import GENAI_CONFIG, genai_config


class NativeLayout(Layout):
    name = "native"
    marker = MANIFEST
    windowed_caches = True
    merges_soft_tokens = True
    writes_manifest = True

    def graph_files(self, precision: str) -> Mapping[str, str]:
        text = {name: f"{name}.onnx" for name in ("decoder", "prefill", "scorer", "embedding", "candidates")}
        return text | {modality: f"{modality}_encoder.onnx" for modality in ("vision", "audio")}

    def config_files(self, model_config: Mapping[str, Any], manifest: Manifest, config: TextConfig) -> ConfigFiles:
        return {"config.json": model_config, GENAI_CONFIG: genai_config(manifest, config)}
