"""The parameters of the decoder graph, without torch."""

from __future__ import annotations

from collections.abc import Iterator

from .config import TextConfig

Shape = tuple[int, ...]


def parameter_shapes(config: TextConfig) -> dict[str, Shape]:
    """Shape of every parameter of `decoder.Decoder`, in the order in which the layers use them."""
    hidden, ple, streams = config.hidden_size, config.hidden_size_per_layer_input, config.altup_num_inputs
    shapes = {
        f"layers.{i}.{name}": shape
        for i, width in enumerate(config.intermediate_sizes)
        for name, shape in _layer(config, width, produces=i < config.num_kv_layers)
    }
    shapes["norm.weight"] = (hidden,)
    shapes["per_layer_model_projection.weight"] = (config.num_layers * ple, hidden)
    shapes["per_layer_projection_norm.weight"] = (ple,)
    for name in ("altup_projections", "altup_unembed_projections"):
        shapes |= {f"{name}.{i}.weight": (hidden, hidden) for i in range(streams - 1)}
    shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _layer(config: TextConfig, width: int, *, produces: bool) -> Iterator[tuple[str, Shape]]:
    """`produces`: the layer has K and V of its own."""
    hidden, ple, streams = config.hidden_size, config.hidden_size_per_layer_input, config.altup_num_inputs
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "self_attn.q_proj.weight", (query, hidden)
    yield "self_attn.q_norm.weight", (config.head_dim,)
    yield "self_attn.o_proj.weight", (hidden, query)
    if produces:
        yield "self_attn.k_proj.weight", (key, hidden)
        yield "self_attn.v_proj.weight", (key, hidden)
        yield "self_attn.k_norm.weight", (config.head_dim,)
    yield "mlp.gate_proj.weight", (width, hidden)
    yield "mlp.up_proj.weight", (width, hidden)
    yield "mlp.down_proj.weight", (hidden, width)
    for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        yield f"{name}_layernorm.weight", (hidden,)
    yield "altup.correct_output_scale", (hidden,)
    yield "altup.correction_coefs.weight", (streams, streams)
    yield "altup.prediction_coefs.weight", (streams**2, streams)
    yield "altup.modality_router.weight", (streams, hidden)
    yield "altup.router_norm.weight", (hidden,)
    yield "laurel.linear_left.weight", (config.laurel_rank, hidden)
    yield "laurel.linear_right.weight", (hidden, config.laurel_rank)
    yield "laurel.post_laurel_norm.weight", (hidden,)
    yield "per_layer_input_gate.weight", (ple, hidden)
    yield "per_layer_projection.weight", (hidden, ple)
    yield "post_per_layer_input_norm.weight", (hidden,)
