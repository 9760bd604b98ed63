"""Proof that the parity tests can fail: an oracle with one feature changed is far from the artifact.

It also shows that each feature is active in the tiny checkpoint.
"""

from __future__ import annotations

import copy
from types import MethodType

import pytest
import torch
from torch import nn

from oracle import LONG, TOLERANCE, generate_greedily, oracle_logits, random_prompt, relative_error

STEPS = 16
FAR = 10 * TOLERANCE


def zero(*paths):
    """Zeroes a weight that every layer, or the model, has."""

    def change(oracle):
        for path in paths:
            weights = [p for name, p in oracle.named_parameters() if path in name]
            assert weights, path
            for weight in weights:
                weight.zero_()

    return change


def fill_with_ones(path):
    def change(oracle):
        for name, weight in oracle.named_parameters():
            if path in name:
                weight.fill_(1.0)

    return change


def in_each_attention(**values):
    def change(oracle):
        for layer in oracle.model.layers:
            for key, value in values.items():
                setattr(layer.self_attn, key, value)

    return change


def in_config(**values):
    def change(oracle):
        for key, value in values.items():
            setattr(oracle.config, key, value)

    return change


def other_donor(kind):
    """The shared layers of one type read the producer of that type before the last."""

    def change(oracle):
        attentions = [layer.self_attn for layer in oracle.model.layers]
        producers = [a for a in attentions if a.layer_type == kind and not a.is_kv_shared_layer]
        producers[-1].store_full_length_kv = False
        producers[-2].store_full_length_kv = True
        for attention in attentions:
            if attention.layer_type == kind and attention.is_kv_shared_layer:
                attention.kv_shared_layer_index = producers[-2].layer_idx  # what counts before transformers 5.23

    return change


def kv_sharing_off(oracle):
    """The shared layers project K and V from their own input, by their donor's weights."""
    attentions = [layer.self_attn for layer in oracle.model.layers]
    donors = {a.layer_type: a for a in attentions if a.store_full_length_kv}
    for attention in attentions:
        if attention.is_kv_shared_layer:
            for name in ("k_proj", "v_proj", "k_norm", "v_norm"):
                setattr(attention, name, getattr(donors[attention.layer_type], name))
            attention.is_kv_shared_layer = False


def rope_theta_swapped(oracle):
    rotary = oracle.model.rotary_emb
    sliding, full = rotary.sliding_attention_inv_freq, rotary.full_attention_inv_freq
    rotary.sliding_attention_inv_freq, rotary.full_attention_inv_freq = full, sliding


def rope_of_full_layers_as_of_sliding(oracle):
    rotary = oracle.model.rotary_emb
    rotary.full_attention_inv_freq = rotary.sliding_attention_inv_freq


def no_sparsity(oracle):
    for layer in oracle.model.layers:
        layer.mlp.activation_sparsity = 0.0


def sparsity_everywhere(oracle):
    for layer in oracle.model.layers:
        layer.mlp.activation_sparsity = 0.95


def sample_deviation(oracle):
    def topk(self, inputs):
        return nn.functional.relu(inputs - inputs.mean(-1, keepdim=True) - 1.6448536 * inputs.std(-1, keepdim=True))

    for layer in oracle.model.layers:
        layer.mlp._gaussian_topk = MethodType(topk, layer.mlp)


def exact_gelu(oracle):
    for layer in oracle.model.layers:
        layer.mlp.act_fn = nn.GELU()


def value_norm_off(oracle):
    for layer in oracle.model.layers:
        layer.self_attn.v_norm = nn.Identity()


def norms_multiply_by_one_plus_weight(oracle):
    for name, weight in oracle.named_parameters():
        if name.endswith("layernorm.weight"):
            weight.add_(1.0)


def last_row_for_ids_without_one(oracle):
    model, rows = oracle.model, oracle.config.vocab_size_per_layer_input

    def rows_of(self, ids):
        ids = ids.clamp(max=rows - 1)
        return self.embed_tokens_per_layer(ids).reshape(*ids.shape, self.config.num_hidden_layers, -1)

    model.get_per_layer_inputs = MethodType(rows_of, model)


def embeddings_not_scaled(oracle):
    oracle.model.embed_tokens.embed_scale.fill_(1.0)


CHANGES = {
    "KV sharing off": kv_sharing_off,
    "other sliding donor": other_donor("sliding_attention"),
    "other full donor": other_donor("full_attention"),
    "window 15": in_config(sliding_window=15),
    "window 17": in_config(sliding_window=17),
    "no window": in_config(sliding_window=4096),
    "no sparsity": no_sparsity,
    "sparsity in all layers": sparsity_everywhere,
    "sample instead of population deviation": sample_deviation,
    "no softcap": in_config(final_logit_softcapping=1e6),
    "RoPE theta swapped": rope_theta_swapped,
    "one RoPE theta": rope_of_full_layers_as_of_sliding,
    "attention scale 1/sqrt(d)": in_each_attention(scaling=0.25),
    "no query norm weight": fill_with_ones("q_norm"),
    "no key norm weight": fill_with_ones("k_norm"),
    "no value norm": value_norm_off,
    "norms by 1 + weight": norms_multiply_by_one_plus_weight,
    "AltUp predictions off": zero("prediction_coefs"),
    "AltUp corrections off": zero("correction_coefs"),
    "AltUp routers off": zero("modality_router"),
    "AltUp output scale off": fill_with_ones("correct_output_scale"),
    "AltUp streams merged from the first": zero("altup_unembed_projections"),
    "AltUp streams split from the first": zero("altup_projections"),
    "LAuReL off": zero("linear_right"),
    "PLE table off": zero("embed_tokens_per_layer"),
    "PLE model projection off": zero("per_layer_model_projection"),
    "PLE injection off": zero("per_layer_projection.weight"),
    "last PLE row for ids without one": last_row_for_ids_without_one,
    "embeddings not scaled": embeddings_not_scaled,
}


@pytest.fixture(scope="module")
def ours(tiny_model):
    return generate_greedily(tiny_model, random_prompt(LONG, vocab_size=1280), STEPS)


def error_against(oracle, ours, change):
    changed = copy.deepcopy(oracle)
    with torch.no_grad():
        change(changed)
    return relative_error(ours.logits, oracle_logits(changed, ours.oracle_ids, STEPS))


def test_unchanged_oracle_is_near(ours, tiny_oracle):
    error = error_against(tiny_oracle, ours, lambda _: None)
    print(f"nothing changed: error {error:.2e} of the range")
    assert error <= TOLERANCE


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_oracle_is_far(request, tiny_oracle, ours, change):
    error = error_against(tiny_oracle, ours, change)
    print(f"{request.node.callspec.id}: error {error:.2e} of the range (at least {FAR:.0e})")
    assert error >= FAR


def test_even_the_two_forms_of_gelu_are_told_apart(tiny_oracle, ours):
    """They differ by 5e-4 at most, so the measure is the artifact's own error, not the tolerance."""
    near, far = (error_against(tiny_oracle, ours, change) for change in (lambda _: None, exact_gelu))
    print(f"exact GELU: error {far:.2e} of the range, tanh GELU: {near:.2e}")
    assert far >= 10 * near
