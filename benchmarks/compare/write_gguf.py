"""`write_gguf.py CHECKPOINT FILE`: a text checkpoint as llama.cpp's own converter lays it out, then quantized to Q4_0
by llama.cpp.

The vocabulary is made of numbers: contestants are given ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import NormalDist

import gguf
import llama_cpp
import ml_dtypes
import numpy as np
from safetensors import safe_open

PREFIX = "model."
IN_FP32 = ("correction_coefs", "prediction_coefs")


def main(checkpoint: Path, output: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    whole = output.with_suffix(".bf16.gguf")
    write(config, read_all(checkpoint), whole)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    if llama_cpp.llama_model_quantize(str(whole).encode(), str(output).encode(), options):
        raise RuntimeError(f"{whole} could not be quantized")
    whole.unlink()


def read_all(checkpoint: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            tensors |= {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def write(config: dict, tensors: dict[str, np.ndarray], path: Path) -> None:
    writer = gguf.GGUFWriter(path, "gemma3n")
    layers, vocab = config["num_hidden_layers"], config["vocab_size"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["full_attention"]["rope_theta"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_altup_active_idx(config["altup_active_idx"])
    writer.add_altup_num_inputs(config["altup_num_inputs"])
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    writer.add_shared_kv_layers(config["num_kv_shared_layers"])
    writer.add_activation_sparsity_scale([cut_of(share) for share in config["activation_sparsity_pattern"]])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([str(number) for number in range(vocab)])
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types([gguf.TokenType.NORMAL] * vocab)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3N, layers)
    for name, values in (unused(config) | laid_out(tensors, vocab)).items():
        own = names.get_name(PREFIX + name, try_suffixes=(".weight", ".bias"))
        if own is None:
            raise KeyError(name)
        if values.ndim == 1 or any(part in name for part in IN_FP32):
            writer.add_tensor(own, values.astype(np.float32))
        else:
            bits = np.ascontiguousarray(values.astype(ml_dtypes.bfloat16, copy=False))
            writer.add_tensor(own, bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


def cut_of(share: float) -> float:
    """Standard deviations above the mean beyond which 1 - `share` of a normal distribution lies."""
    return NormalDist().inv_cdf(share) if share else float("-inf")


def unused(config: dict) -> dict[str, np.ndarray]:
    """Of layers that read others' K and V: their own, which llama.cpp wants to be there."""
    layers, shared = config["num_hidden_layers"], config["num_kv_shared_layers"]
    matrix = np.zeros((config["num_key_value_heads"] * config["head_dim"], config["hidden_size"]), ml_dtypes.bfloat16)
    norm = np.ones(config["head_dim"], ml_dtypes.bfloat16)
    return {
        f"layers.{layer}.self_attn.{name}.weight": values
        for layer in range(layers - shared, layers)
        for name, values in (("k_proj", matrix), ("v_proj", matrix), ("k_norm", norm))
    }


def laid_out(tensors: dict[str, np.ndarray], vocab: int) -> dict[str, np.ndarray]:
    """AltUp's projections stacked, tables filled up to the vocabulary, every name ending in `.weight`."""
    made: dict[str, np.ndarray] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for name, values in sorted(tensors.items()):
        stack = name.removesuffix(".weight").rpartition(".")
        if stack[0] in ("altup_projections", "altup_unembed_projections"):
            stacks.setdefault(stack[0], []).append(values)
        elif name.startswith("embed_tokens"):
            rest = np.zeros((vocab - len(values), values.shape[1]), values.dtype)
            made[name] = np.concatenate([values, rest]) if len(rest) else values
        elif name != "lm_head.weight":
            made[name if name.endswith(".weight") else f"{name}.weight"] = values
    return made | {f"{name}.weight": np.stack(parts) for name, parts in stacks.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
