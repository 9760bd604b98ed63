"""`genai_config.json`, which lets onnxruntime-genai 0.18 run an artifact's folder unchanged.

In an artifact for CUDA every session but the embedding, whose tables stay on the host, uses the CUDA provider.

onnxruntime-genai has no `gemma3n`; its `gemma4` has the same graphs (embedding with a table of per-layer inputs,
vision, speech, decoder) but requires the vision graph. An artifact without one becomes a two-stage `decoder-pipeline`.
"""

from __future__ import annotations

from typing import Any

from gemma3n_onnx.graphs import names
from gemma3n_onnx.graphs.config import TextConfig
from gemma3n_onnx.runtime.artifact import GraphInfo, Manifest, cpu_session_config

GENAI_CONFIG = "genai_config.json"
_PAST_KEY, _PAST_VALUE = names.past("%d")
_PRESENT_KEY, _PRESENT_VALUE = names.present("%d")


def genai_config(manifest: Manifest, config: TextConfig) -> dict[str, Any]:
    """The content of the file; `config` is the decoder's."""
    model: dict[str, Any] = {
        "type": "gemma4" if manifest.vision else "decoder-pipeline",
        "bos_token_id": manifest.bos_token_id,
        "pad_token_id": manifest.pad_token_id,
        "eos_token_id": list(manifest.eos_token_ids),
        "context_length": manifest.max_context,
        "vocab_size": manifest.vocab_size,
        "decoder": _decoder(manifest, config),
    }
    if manifest.vision:
        model["embedding"] = _embedding(manifest)
        model["vision"] = {
            "filename": manifest.vision.graph.file,
            "session_options": _options(manifest),
            "inputs": _names(manifest.vision.graph, [names.PIXEL_VALUES]),
            "outputs": {"image_features": names.IMAGE_FEATURES},
        }
        model["image_token_id"] = manifest.vision.soft_tokens.token_id
        model["speech"] = _speech(manifest)
    else:
        model["decoder"]["pipeline"] = _pipeline(manifest)
    return {
        "model": model,
        "search": {
            "max_length": manifest.max_context,
            "min_length": 0,
            "do_sample": False,
            "num_beams": 1,
            "num_return_sequences": 1,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "past_present_share_buffer": True,
        },
    }


def _cpu_options(quantized: bool = False) -> dict[str, Any]:
    return {"log_id": "onnxruntime-genai", **cpu_session_config(quantized)}


def _options(manifest: Manifest, *, quantized: bool = False) -> dict[str, Any]:
    options = _cpu_options(quantized)
    return options if manifest.target == "cpu" else {**options, "provider_options": [{"cuda": {}}]}


def _decoder(manifest: Manifest, config: TextConfig) -> dict[str, Any]:
    decoder: dict[str, Any] = {
        "filename": manifest.decoder.file,
        "session_options": _options(manifest, quantized=bool(manifest.quantization)),
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": len(manifest.caches),
        "num_key_value_heads": config.num_kv_heads,
        "inputs": {
            "inputs_embeds": names.INPUTS_EMBEDS,
            "attention_mask": names.ATTENTION_MASK,
            "position_ids": names.POSITION_IDS,
            "per_layer_inputs": names.PER_LAYER_INPUTS,
            "past_key_names": _PAST_KEY,
            "past_value_names": _PAST_VALUE,
        },
        "outputs": {"logits": names.LOGITS, "present_key_names": _PRESENT_KEY, "present_value_names": _PRESENT_VALUE},
    }
    windowed = [index for index, cache in enumerate(manifest.caches) if cache.window is not None]
    if windowed:
        decoder["sliding_window"] = {
            "window_size": config.sliding_window,
            "slide_key_value_cache": False,
            "slide_inputs": False,
            "layers": windowed,
            "cache_slack": config.sliding_window // 4,
        }
    return decoder


def _embedding(manifest: Manifest) -> dict[str, Any]:
    return {
        "filename": manifest.embedding.file,
        "session_options": _cpu_options(),
        "inputs": _names(manifest.embedding, [names.INPUT_IDS, names.IMAGE_FEATURES, names.AUDIO_FEATURES]),
        "outputs": {"inputs_embeds": names.INPUTS_EMBEDS, "per_layer_inputs": names.PER_LAYER_INPUTS},
    }


def _speech(manifest: Manifest) -> dict[str, Any]:
    """The section is required even without an audio encoder.

    `config_filename` must name a file, which only the library's own front end (Gemma 4's) would read.
    """
    if manifest.audio is None:
        return {"config_filename": ""}
    return {
        "filename": manifest.audio.graph.file,
        "config_filename": "config.json",
        "session_options": _options(manifest),
        "inputs": {"audio_embeds": names.INPUT_FEATURES, "attention_mask": names.INPUT_FEATURES_MASK},
        "outputs": {"audio_features": names.AUDIO_FEATURES},
    }


def _pipeline(manifest: Manifest) -> list[dict[str, Any]]:
    stages = {
        "embeddings": (manifest.embedding, _cpu_options()),
        "transformer": (manifest.decoder, _options(manifest, quantized=bool(manifest.quantization))),
    }
    return [
        {
            name: {
                "filename": graph.file,
                "session_options": options,
                "inputs": [tensor.name for tensor in graph.inputs],
                "outputs": [tensor.name for tensor in graph.outputs],
            }
            for name, (graph, options) in stages.items()
        }
    ]


def _names(graph: GraphInfo, wanted: list[str]) -> dict[str, str]:
    """The `wanted` names that are inputs of the graph, mapped to themselves."""
    found = {tensor.name for tensor in graph.inputs}
    return {name: name for name in wanted if name in found}
