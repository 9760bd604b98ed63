"""Each slice against transformers on weights that this file cuts itself, from the published rules."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

from gemma3n_onnx.runtime import OnnxGemma3n
from oracle import (
    LONG,
    TOLERANCE,
    assert_close,
    generate_greedily,
    oracle_logits,
    random_prompt,
    read_row_0_above_the_table,
)

# FFN widths in eighths of the checkpoint's, run by run, and the skipped layers.
SKIPPED = tuple(range(20, 25))
PUBLISHED = {
    "E4B": ("8x35", ()),
    "E2B": ("4x30", SKIPPED),
    "E1.96B-layer": ("4x4 8x1 4x25", SKIPPED),
    "E2.54B-layer": ("4x4 8x1 4x15 8x5 4x10", ()),
    "E2.69B-layer": ("4x4 8x1 4x4 8x1 4x4 8x1 4x4 8x6 4x10", ()),
    "E2.98B-layer": ("4x15 8x10 4x5 8x5", ()),
    "E3.18B-layer": ("4x4 8x1 4x4 8x16 4x4 8x1 4x4 8x1", ()),
    "E3.39B-layer": ("4x4 8x1 4x4 8x21 4x4 8x1", ()),
    "E3.59B-layer": ("4x4 8x26 4x4 8x1", ()),
    "E3.79B-layer": ("4x4 8x31", ()),
    "E2.49B-block": ("4x20 8x5 4x10", ()),
    "E2.73B-block": ("4x15 8x10 4x10", ()),
    "E2.98B-block": ("4x10 8x15 4x10", ()),
    "E3.24B-block": ("4x10 8x20 4x5", ()),
    "E3.49B-block": ("4x5 8x25 4x5", ()),
    "E3.79B-block": ("4x5 8x30", ()),
}


def sliced_oracle(checkpoint: Path, widths: list[int], skipped: tuple[int, ...]) -> Gemma3nForCausalLM:
    """transformers on the slice: `widths` of the layers that stay, in order."""
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = load_file(checkpoint / "model.safetensors")
    layers, group = config["num_hidden_layers"], config["hidden_size_per_layer_input"]
    first_shared = layers - config["num_kv_shared_layers"]
    kept = [i for i in range(layers) if i not in skipped]
    config.update(
        num_hidden_layers=len(kept),
        intermediate_size=widths,
        layer_types=[config["layer_types"][i] for i in kept],
        activation_sparsity_pattern=[config["activation_sparsity_pattern"][i] for i in kept],
        num_kv_shared_layers=sum(i >= first_shared for i in kept),
    )

    state = {name: value for name, value in tensors.items() if not name.startswith("model.layers.")}
    columns = np.concatenate([np.arange(i * group, (i + 1) * group) for i in kept])
    state["model.embed_tokens_per_layer.weight"] = state["model.embed_tokens_per_layer.weight"][:, columns]
    state["model.per_layer_model_projection.weight"] = state["model.per_layer_model_projection.weight"][columns]
    for new, (old, width) in enumerate(zip(kept, widths, strict=True)):
        prefix = f"model.layers.{old}."
        for name in [n for n in tensors if n.startswith(prefix)]:
            value = tensors[name]
            if "mlp.gate_proj" in name or "mlp.up_proj" in name:
                value = value[:width]
            elif "mlp.down_proj" in name:
                value = value[:, :width]
            state[f"model.layers.{new}.{name.removeprefix(prefix)}"] = value
    state["lm_head.weight"] = state["model.embed_tokens.weight"]

    oracle = Gemma3nForCausalLM._from_config(Gemma3nTextConfig(**config), attn_implementation="eager").eval()
    oracle.load_state_dict({n: torch.from_numpy(np.array(v, order="C")) for n, v in state.items()}, strict=True)
    read_row_0_above_the_table(oracle)
    return oracle


def assert_slice_equals(artifact: Path, oracle: Gemma3nForCausalLM, name: str) -> np.ndarray:
    ours = generate_greedily(OnnxGemma3n.from_pretrained(artifact), random_prompt(LONG, seed=7), 24)
    theirs = oracle_logits(oracle, ours.oracle_ids, 24)
    assert_close(name, ours.logits, theirs, TOLERANCE)
    assert ours.tokens == theirs.argmax(-1).tolist()
    return ours.logits[0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_slice_equals_transformers(tiny_checkpoint, exported, name):
    runs, skipped = PUBLISHED[name]
    widths = []
    for run in runs.split():
        eighths, count = map(int, run.split("x"))
        widths += [eighths * 256 // 8] * count
    oracle = sliced_oracle(tiny_checkpoint, widths, skipped)
    assert_slice_equals(exported(tiny_checkpoint, slice=name), oracle, name)


def test_custom_slice_of_mixed_widths_and_skipped_layers_equals_transformers(
    shallow_checkpoint, exported, tmp_path, shallow_model
):
    # 2 produces K and V, 6 reads them; the donors, 3 and 4, become layers 2 and 3.
    widths, skipped = [32, 256, 96, 64, 224, 128, 32, 160], (2, 6)
    table = tmp_path / "own.csv"
    table.write_text(
        "name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped\n"
        'Mixed, 8, , , "[3_2, 2_56, 32 * 3, 64, 224, 1_28, 32, 16 * 10]", "[2, 6]"\n'
    )
    artifact = exported(shallow_checkpoint, slice="mixed", matformer_config=table)
    logits = assert_slice_equals(artifact, sliced_oracle(shallow_checkpoint, widths, skipped), "Mixed")
    whole = generate_greedily(shallow_model, random_prompt(LONG, seed=7), 1).logits[0]
    assert np.abs(logits - whole).max() > 1, "the slice is not the whole model"
