"""Writes a checkpoint with random weights that transformers and the exporter read like a published one.

The weights are drawn so that every part of the architecture affects the output: norm weights differ from one, the AltUp
routers and the activation sparsity are active, attention is neither uniform nor one-hot, and logits reach the softcap.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gemma3n_onnx.export.errors import ExportOptionError
from gemma3n_onnx.export.writer import CHECKPOINT, staged, write_json
from gemma3n_onnx.graphs import audio, vision
from gemma3n_onnx.graphs.config import FULL, SLIDING, ConfigError, TextConfig

from .checkpoint import FULL_NAMING, INDEX, TEXT_ONLY_NAMING, WEIGHTS
from .make_tokenizer import BOS, END_OF_TURN, EOS, PAD, SMALLEST_TEXT_VOCAB, SOFT_IDS, SpecialIds, write_tokenizer
from .safetensors_file import LENGTH_BYTES, NUMPY_DTYPES

Size = Literal["tiny", "e2b", "e4b"]
Dtype = Literal["float32", "bfloat16"]

E4B_TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": 262_400,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size": 2048,
    "hidden_size_per_layer_input": 256,
    "intermediate_size": 16_384,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "num_kv_shared_layers": 15,
    "sliding_window": 512,
    "laurel_rank": 64,
    "altup_num_inputs": 4,
    "max_position_embeddings": 32_768,
}
SIZES: dict[str, dict[str, Any]] = {
    "e4b": E4B_TEXT_CONFIG,
    "e2b": E4B_TEXT_CONFIG | {"num_hidden_layers": 30, "intermediate_size": 8192, "num_kv_shared_layers": 10},
    "tiny": E4B_TEXT_CONFIG
    | {
        "vocab_size": 1280,
        "vocab_size_per_layer_input": 1024,
        "hidden_size": 64,
        "hidden_size_per_layer_input": 16,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "head_dim": 16,
        "sliding_window": 16,
        "laurel_rank": 8,
        "max_position_embeddings": 4096,
    },
}
# The encoders of the tiny size: all block kinds, few channels.
TINY_VISION: dict[str, Any] = {"model_args": {"channel_multiplier": 0.03}}
TINY_AUDIO: dict[str, Any] = {
    "hidden_size": 64,
    "conf_num_attention_heads": 4,
    "conf_num_hidden_layers": 2,
    "sscp_conv_channel_size": [16, 8],
}
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
SHARD_BYTES = 4_000_000_000
BLOCK_VALUES = 8 * 2**20
SPARE_BYTES = 64 * 2**20  # tokenizer and config files

LOGIT_STD = 5.0
ATTENTION_LOGIT_STD = 2.0
NORM_SPREAD = 0.2
# The scale of each layer's residual branch, and how strongly AltUp mixes its streams. With larger values a random
# network of this depth is chaotic: it amplifies fp32 rounding until a comparison is meaningless.
BRANCH_GAIN = 0.5
LAYER_SCALE = 0.3
ALTUP_STD = 0.03


@dataclass(frozen=True)
class _Tensor:
    """A tensor to draw: `mean + std * normal`. `name` is relative to its part of the model."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0


def make_checkpoint(
    size: Size,
    output: Path,
    seed: int = 0,
    *,
    text_only: bool = False,
    dtype: Dtype | None = None,
    overrides: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes a checkpoint (`Gemma3nForConditionalGeneration`) with its tokenizer; equal arguments, equal bytes.

    Args:
        size: "tiny" (E4B's depth, narrow), "e2b" or "e4b".
        output: the folder to write; it appears only when it is complete.
        seed: seed of all weights.
        text_only: omits the encoders (`Gemma3nForCausalLM`); the decoder's weights are the same.
        dtype: dtype of all weights; float32 for tiny, bfloat16 for the others.
        overrides: values of the text config that replace those of the size.
        progress: called with the bytes written and the total.
        force: replaces an existing checkpoint at `output`.
        shard_bytes: maximum size of a weight file.

    Returns:
        `output`.

    Raises:
        ExportOptionError: an unknown size, dtype or override, or values that do not describe a Gemma 3n.
        ExportError: `output` is taken, or the disk is too small.
    """
    if size not in SIZES:
        raise ExportOptionError(f"Unknown size {size!r}; choose one of {', '.join(sorted(SIZES))}.")
    dtype = dtype or ("float32" if size == "tiny" else "bfloat16")
    if dtype not in SAFETENSORS_DTYPES:
        raise ExportOptionError(f"Unknown dtype {dtype!r}; choose one of {', '.join(SAFETENSORS_DTYPES)}.")
    if not isinstance(seed, int) or seed < 0:
        raise ExportOptionError(f"The seed is {seed!r}; give a whole number of at least 0.")
    text, architecture = text_config(size, dtype, overrides or {})
    reduced = (TINY_VISION, TINY_AUDIO) if size == "tiny" else ({}, {})
    config = text if text_only else full_config(text, architecture, *reduced)
    naming = TEXT_ONLY_NAMING if text_only else FULL_NAMING
    tensors = [_Named(naming.text + tensor.name, tensor) for tensor in _tensors(architecture)]
    if not text_only:
        tensors += [_Named(f"{naming.encoders}{tensor.name}", tensor) for tensor in _encoder_tensors(config)]
    shards = _shards(tensors, _itemsize(dtype), shard_bytes)
    total = sum(math.prod(named.tensor.shape) for shard in shards for named in shard) * _itemsize(dtype)
    output = Path(output)
    with staged(output, force=force, needed_bytes=total + SPARE_BYTES, kind=CHECKPOINT) as partial:
        _write_weights(partial, shards, dtype, seed, total, progress=progress)
        write_json(partial / "config.json", config)
        write_tokenizer(partial, architecture.vocab_size_per_layer_input, architecture.vocab_size)
        if not text_only:
            write_json(partial / "preprocessor_config.json", PREPROCESSOR)
    return output


def text_config(size: Size, dtype: Dtype, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], TextConfig]:
    """The text config of `size` with `overrides`, every per-layer list filled in, and the architecture it describes.

    ExportOptionError: an unknown override, or values that do not describe a Gemma 3n.
    """
    config: dict[str, Any] = {
        "architectures": ["Gemma3nForCausalLM"],
        "model_type": "gemma3n_text",
        "dtype": dtype,
        **SIZES[size],
        "layer_types": None,
        "activation_sparsity_pattern": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
            FULL: {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
        "altup_active_idx": 0,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": BOS,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if unknown := sorted(set(overrides) - set(config)):
        raise ExportOptionError(f"Unknown override {unknown[0]!r}; use one of {', '.join(sorted(config))}.")
    config |= overrides
    return config, _architecture(config)


def full_config(
    text: dict[str, Any], architecture: TextConfig, vision: Mapping[str, Any], audio: Mapping[str, Any]
) -> dict[str, Any]:
    """The full config: the text config and both encoders, whose ids are at the end of the vocabulary.

    `vision` and `audio`: values that replace those of the full-size encoders.
    """
    special = SpecialIds.of_text_vocab(architecture.vocab_size - 2 * SOFT_IDS)
    vision_config = {
        "model_type": "gemma3n_vision",
        "architecture": "mobilenetv5_300m_enc",
        "hidden_size": 2048,
        "vocab_size": SOFT_IDS,
        "vocab_offset": architecture.vocab_size - 2 * SOFT_IDS,
        "rms_norm_eps": 1e-6,
        "do_pooling": False,
        "initializer_range": 0.02,
        **vision,
    }
    audio_config = {
        "model_type": "gemma3n_audio",
        "vocab_size": SOFT_IDS,
        "vocab_offset": architecture.vocab_size - SOFT_IDS,
        "input_feat_size": 128,
        "hidden_size": 1536,
        "rms_norm_eps": 1e-6,
        "gradient_clipping": 1e10,
        "conf_attention_chunk_size": 12,
        "conf_attention_context_left": 13,
        "conf_attention_context_right": 0,
        "conf_attention_logit_cap": 50.0,
        "conf_num_attention_heads": 8,
        "conf_num_hidden_layers": 12,
        "conf_conv_kernel_size": 5,
        "conf_reduction_factor": 4,
        "conf_residual_weight": 0.5,
        "sscp_conv_channel_size": [128, 32],
        "sscp_conv_group_norm_eps": 1e-3,
        "sscp_conv_kernel_size": [[3, 3], [3, 3]],
        "sscp_conv_stride_size": [[2, 2], [2, 2]],
        **audio,
    }
    shared = {key: text[key] for key in ("dtype", "pad_token_id", "bos_token_id", "initializer_range")}
    return {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "model_type": "gemma3n",
        **shared,
        "eos_token_id": [EOS, END_OF_TURN],
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": vision_config,
        "audio_config": audio_config,
        "vision_soft_tokens_per_image": 256,
        "audio_soft_tokens_per_image": 188,
        "boi_token_id": special.start_of_image,
        "eoi_token_id": special.end_of_image,
        "image_token_id": special.image_soft_token,
        "boa_token_id": special.start_of_audio,
        "eoa_token_id": special.end_of_audio,
        "audio_token_id": special.audio_soft_token,
    }


PREPROCESSOR: dict[str, Any] = {
    "processor_class": "Gemma3nProcessor",
    "image_processor_type": "SiglipImageProcessor",
    "do_convert_rgb": None,
    "do_normalize": False,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_seq_length": 256,
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": 768, "width": 768},
    "feature_extractor_type": "Gemma3nAudioFeatureExtractor",
    "audio_seq_length": 188,
    "dither": 0.0,
    "feature_size": 128,
    "fft_length": 1024,
    "fft_overdrive": True,
    "frame_length": 512,
    "hop_length": 160,
    "input_scale_factor": 1.0,
    "max_frequency": 7600.0,
    "mel_floor": 1e-05,
    "min_frequency": 125.0,
    "padding_side": "right",
    "padding_value": 0.0,
    "per_bin_mean": None,
    "per_bin_stddev": None,
    "preemphasis": 0.97,
    "preemphasis_htk_flavor": True,
    "return_attention_mask": True,
    "sampling_rate": 16_000,
}


def _architecture(config: dict[str, Any]) -> TextConfig:
    """The architecture of `config`, whose per-layer lists are filled in."""
    try:
        architecture = TextConfig.from_hf(config)
    except ConfigError as error:
        raise ExportOptionError(f"These overrides do not describe a Gemma 3n: {error}") from error
    config["layer_types"] = list(architecture.layer_types)
    config["activation_sparsity_pattern"] = list(architecture.activation_sparsity)
    config["intermediate_size"] = list(architecture.intermediate_sizes)
    text_vocab = architecture.vocab_size_per_layer_input
    if text_vocab < SMALLEST_TEXT_VOCAB or architecture.vocab_size < text_vocab + 2 * SOFT_IDS:
        raise ExportOptionError(
            f"vocab_size {architecture.vocab_size} and vocab_size_per_layer_input {text_vocab} are too small "
            f"for the tokenizer; the latter must be at least {SMALLEST_TEXT_VOCAB}, and the former at least "
            f"{2 * SOFT_IDS} larger."
        )
    return architecture


def _tensors(c: TextConfig) -> Iterator[_Tensor]:
    """All tensors of the text decoder, in file order."""
    hidden, ple, streams = c.hidden_size, c.hidden_size_per_layer_input, c.altup_num_inputs

    def linear(name: str, rows: int, columns: int) -> _Tensor:
        return _Tensor(f"{name}.weight", (rows, columns), 1 / math.sqrt(columns))

    def norm(name: str, width: int, mean: float = 1.0) -> _Tensor:
        return _Tensor(f"{name}.weight", (width,), NORM_SPREAD * mean, mean)

    yield _Tensor("embed_tokens.weight", (c.vocab_size, hidden), LOGIT_STD / math.sqrt(hidden))
    yield _Tensor(
        "embed_tokens_per_layer.weight",
        (c.vocab_size_per_layer_input, c.num_layers * ple),
        1 / math.sqrt(ple),
    )
    yield linear("per_layer_model_projection", c.num_layers * ple, hidden)
    yield norm("per_layer_projection_norm", ple)
    for stream in range(streams - 1):
        yield linear(f"altup_projections.{stream}", hidden, hidden)
        yield linear(f"altup_unembed_projections.{stream}", hidden, hidden)
    # Zero mean: otherwise the tied head finds the token's own embedding in the residual and repeats the token.
    yield _Tensor("norm.weight", (hidden,), 1.0)

    # Normed queries and keys have unit values, so q.k over head_dim has this std at scale 1.
    qk_norm = math.sqrt(ATTENTION_LOGIT_STD / math.sqrt(c.head_dim))
    for i, ffn in enumerate(c.intermediate_sizes):
        layer = f"layers.{i}"
        for name in ("input_layernorm", "pre_feedforward_layernorm"):
            yield norm(f"{layer}.{name}", hidden)
        for name in (
            "post_attention_layernorm",
            "post_feedforward_layernorm",
            "laurel.post_laurel_norm",
            "post_per_layer_input_norm",
        ):
            yield norm(f"{layer}.{name}", hidden, BRANCH_GAIN)
        yield linear(f"{layer}.self_attn.q_proj", c.num_heads * c.head_dim, hidden)
        yield norm(f"{layer}.self_attn.q_norm", c.head_dim, qk_norm)
        if i < c.num_kv_layers:
            yield linear(f"{layer}.self_attn.k_proj", c.num_kv_heads * c.head_dim, hidden)
            yield linear(f"{layer}.self_attn.v_proj", c.num_kv_heads * c.head_dim, hidden)
            yield norm(f"{layer}.self_attn.k_norm", c.head_dim, qk_norm)
        yield linear(f"{layer}.self_attn.o_proj", hidden, c.num_heads * c.head_dim)
        yield linear(f"{layer}.mlp.gate_proj", ffn, hidden)
        yield linear(f"{layer}.mlp.up_proj", ffn, hidden)
        yield linear(f"{layer}.mlp.down_proj", hidden, ffn)
        yield linear(f"{layer}.laurel.linear_left", c.laurel_rank, hidden)
        yield linear(f"{layer}.laurel.linear_right", hidden, c.laurel_rank)
        yield linear(f"{layer}.per_layer_input_gate", ple, hidden)
        yield linear(f"{layer}.per_layer_projection", hidden, ple)
        yield _Tensor(f"{layer}.altup.correct_output_scale", (hidden,), NORM_SPREAD, 1.0)
        yield _Tensor(f"{layer}.altup.correction_coefs.weight", (streams, streams), ALTUP_STD)
        yield _Tensor(f"{layer}.altup.prediction_coefs.weight", (streams**2, streams), ALTUP_STD)
        # The router's input is divided by the hidden size; this brings tanh's argument back to unit std.
        yield _Tensor(f"{layer}.altup.modality_router.weight", (streams, hidden), math.sqrt(hidden))
        yield norm(f"{layer}.altup.router_norm", hidden)


def _encoder_tensors(config: Mapping[str, Any]) -> Iterator[_Tensor]:
    """All tensors of both encoders and embedders, drawn so that activations keep their size from layer to layer."""
    shapes = {
        **vision.checkpoint_shapes(vision.VisionConfig.from_hf(config)),
        **audio.checkpoint_shapes(audio.AudioConfig.from_hf(config)),
    }
    for name, shape in shapes.items():
        if len(shape) > 1:
            yield _Tensor(name, shape, 1 / math.sqrt(math.prod(shape[1:])))
        elif name.endswith((".bias", "per_dim_scale")):
            yield _Tensor(name, shape, NORM_SPREAD)
        else:
            mean = LAYER_SCALE if name.endswith(".gamma") else 1.0
            yield _Tensor(name, shape, NORM_SPREAD * mean, mean)


@dataclass(frozen=True)
class _Named:
    """A tensor under its name in the file."""

    name: str
    tensor: _Tensor


def _shards(tensors: Iterable[_Named], itemsize: int, shard_bytes: int) -> list[list[_Named]]:
    shards: list[list[_Named]] = [[]]
    filled = 0
    for named in tensors:
        size = math.prod(named.tensor.shape) * itemsize
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(named)
        filled += size
    return shards


def _write_weights(
    folder: Path,
    shards: list[list[_Named]],
    dtype: str,
    seed: int,
    total: int,
    *,
    progress: Callable[[int, int], None] | None,
) -> None:
    written = 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= {named.name: name for named in shard}
        with (folder / name).open("wb") as file:
            file.write(_header(shard, dtype))
            for named in shard:
                for block in _blocks(named.tensor, dtype, seed):
                    file.write(block.view(np.uint8).data)
                    written += block.nbytes
                    if progress is not None:
                        progress(written, total)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _header(shard: list[_Named], dtype: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for named in shard:
        end = offset + math.prod(named.tensor.shape) * _itemsize(dtype)
        header[named.name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": named.tensor.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _blocks(tensor: _Tensor, dtype: str, seed: int) -> Iterator[np.ndarray]:
    """The tensor's values, flattened, in blocks of `BLOCK_VALUES`, from its own random generator."""
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(f"model.{tensor.name}".encode())]))
    left = math.prod(tensor.shape)
    while left:
        values = generator.standard_normal(min(left, BLOCK_VALUES), dtype=np.float32)
        values *= np.float32(tensor.std)
        values += np.float32(tensor.mean)
        yield values.astype(NUMPY_DTYPES[SAFETENSORS_DTYPES[dtype]], copy=False)
        left -= len(values)


def _itemsize(dtype: str) -> int:
    return NUMPY_DTYPES[SAFETENSORS_DTYPES[dtype]].itemsize
