"""The text decoder, written to be traced: one graph serves prefill and decode.

Parameters have the checkpoint's names, so loading needs no mapping. Tokens are laid out flat, [T, ...]
with T = batch * new tokens, so that every projection is one Gemm over the checkpoint's own weight layout.

Sources of the maths: the Gemma 3n modules of Hugging Face transformers; AltUp (arXiv:2301.13310),
LAuReL (arXiv:2411.07501), MatFormer (arXiv:2310.07707).

Shape legend: B batch, S new tokens, T = B * S, H hidden, L layers, P per-layer-input width,
A AltUp streams, N query heads, K KV heads, D head size, C cache capacity, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import names, ops
from .config import FULL, SLIDING, Logits, TextConfig
from .layers import Linear, RMSNorm
from .repeated import repeated


@dataclass(frozen=True)
class CacheSpec:
    """One KV cache of the graph. If `windowed`, it holds a little more than `window` positions, otherwise all."""

    layer: int
    windowed: bool

    @property
    def past(self) -> tuple[str, str]:
        """The graph's inputs for K and V."""
        return names.past(self.layer)

    @property
    def present(self) -> tuple[str, str]:
        """The graph's outputs for K and V."""
        return names.present(self.layer)


def cache_specs(config: TextConfig, logits: Logits, windows: bool = True) -> tuple[CacheSpec, ...]:
    """The caches in graph order, one for each layer that produces K and V. `windows` makes the caches of sliding
    layers windowed.

    With logits for every position, the KV-shared layers attend from every new position, further back than a windowed
    donor reaches: the sliding donor then keeps all positions.
    """
    readers = range(config.num_kv_layers, config.num_layers)
    donors = {config.kv_source(i) for i in readers} if logits == "all" else set()
    return tuple(
        CacheSpec(layer=i, windowed=windows and config.layer_types[i] == SLIDING and i not in donors)
        for i in range(config.num_kv_layers)
    )


@dataclass
class Step:
    """Values that all layers share in one run; recomputed when the layers continue with the last position only.

    `last_position` and `total_length` count, by layer type, the cache rows that attention may read.
    """

    batch: ops.Size
    rope: dict[str, tuple[Tensor, Tensor]]  # layer type -> cos, sin [B, S, D / 2]
    last_position: dict[str, Tensor]  # int32 [B]
    total_length: dict[str, Tensor]  # int32 [1]
    nothing: Tensor | None = None  # empty keys [B, 0, K * D], made by the first KV-shared layer


class AltUp(nn.Module):
    """Alternating updates over A streams of the hidden state; stream 0 is the active one."""

    identity: Tensor
    ones: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.streams = config.altup_num_inputs
        self.router_scale = 1.0 / config.hidden_size
        self.correct_scale = config.altup_correct_scale
        self.correct_output_scale = nn.Parameter(torch.zeros(config.hidden_size))
        self.correction_coefs = Linear(self.streams, self.streams)
        self.prediction_coefs = Linear(self.streams, self.streams**2)
        self.modality_router = Linear(config.hidden_size, self.streams)
        self.router_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("identity", torch.eye(self.streams, device="cpu").flatten(), persistent=False)
        self.register_buffer("ones", torch.ones(self.streams, device="cpu"), persistent=False)

    def route(self, x: Tensor) -> Tensor:
        """x [T, H] -> modalities [T, A] in (-1, 1)."""
        routed = ops.linear(self.router_norm(x), self.modality_router.weight, scale=self.router_scale)
        return torch.tanh(routed.float()).type_as(x)

    def predict(self, streams: Tensor, active: Tensor) -> Tensor:
        """streams [T, A, H], of which `active` [T, H] is the first -> predictions [T, A, H]."""
        coefs = ops.linear(self.route(active), self.prediction_coefs.weight, self.identity)
        return torch.matmul(ops.reshape(coefs, -1, self.streams, self.streams), streams)

    def correct(self, predictions: Tensor, activated: Tensor) -> Tensor:
        """predictions [T, A, H], activated [T, H] -> corrected streams [T, A, H]."""
        coefs = ops.linear(self.route(activated), self.correction_coefs.weight, self.ones)
        innovation = activated - predictions[:, 0]
        return predictions + coefs.unsqueeze(2) * innovation.unsqueeze(1)

    def scale_corrected(self, active: Tensor) -> Tensor:
        return active * self.correct_output_scale if self.correct_scale else active


class Laurel(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.linear_left = Linear(config.hidden_size, config.laurel_rank)
        self.linear_right = Linear(config.laurel_rank, config.hidden_size)
        self.post_laurel_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, H] -> the residual branch [T, H], without x."""
        return self.post_laurel_norm(self.linear_right(self.linear_left(x)))


class MLP(nn.Module):
    """Gated tanh-GELU. Sparse layers zero the gate values up to mean + z * std of their row."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        width = config.intermediate_sizes[layer]
        sparsity = config.activation_sparsity[layer]
        self.gate_proj = Linear(config.hidden_size, width)
        self.up_proj = Linear(config.hidden_size, width)
        self.down_proj = Linear(width, config.hidden_size)
        self.deviations = NormalDist().inv_cdf(sparsity) if sparsity > 0.0 else None

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x).float()
        if self.deviations is not None:
            centered = gate - gate.mean(-1, keepdim=True)
            std = centered.square().mean(-1, keepdim=True).sqrt()
            gate = F.relu(centered - std * self.deviations)
        return self.down_proj(F.gelu(gate, approximate="tanh").type_as(x) * self.up_proj(x))


class Attention(nn.Module):
    """Grouped-query attention. A KV-shared layer has no K and V projections and reads its donor's present."""

    v_norm: Tensor
    not_repeated = ("kind", "window", "windowed_cache")

    def __init__(self, config: TextConfig, layer: int, windowed_cache: bool) -> None:
        super().__init__()
        self.kind = config.layer_types[layer]
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.window = config.sliding_window if self.kind == SLIDING else None
        self.windowed_cache = windowed_cache
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.q_proj = Linear(hidden, self.heads * self.head_dim)
        self.q_norm = RMSNorm(self.head_dim, eps)
        self.o_proj = Linear(self.heads * self.head_dim, hidden)
        if layer < config.num_kv_layers:
            self.k_proj = Linear(hidden, self.kv_heads * self.head_dim)
            self.v_proj = Linear(hidden, self.kv_heads * self.head_dim)
            self.k_norm = RMSNorm(self.head_dim, eps)
            self.register_buffer("v_norm", torch.ones(self.head_dim, device="cpu"), persistent=False)

    def heads_of(self, x: Tensor, norm: Tensor, batch: ops.Size) -> Tensor:
        """x [T, heads * D] -> normed by head, [B, S, heads * D]."""
        normed = ops.rms_norm(ops.reshape(x, -1, self.head_dim), norm, self.q_norm.eps)
        return ops.reshape(normed, batch, -1, x.shape[1])

    def query(self, x: Tensor, batch: ops.Size, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x [T, H], rope [B, S, D / 2] -> [B, S, N * D]."""
        return ops.rotary_embedding(self.heads_of(self.q_proj(x), self.q_norm.weight, batch), *rope, self.heads)

    def key_and_value(self, x: Tensor, batch: ops.Size, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """x [T, H], rope [B, S, D / 2] -> keys and values [B, S, K * D]."""
        key = ops.rotary_embedding(self.heads_of(self.k_proj(x), self.k_norm.weight, batch), *rope, self.kv_heads)
        return key, self.heads_of(self.v_proj(x), self.v_norm, batch)

    def produce(self, x: Tensor, past: tuple[Tensor, Tensor], step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, H] -> attention [T, N * D] (before `o_proj`) and the present K, V [B, K, C, D]."""
        inputs = x, step.batch, step.rope[self.kind]
        output, present_key, present_value = ops.attend_and_cache(
            repeated(self.query, *inputs),
            *repeated(self.key_and_value, *inputs),
            *past,
            step.last_position[FULL],
            step.total_length[FULL],
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            window=self.window,
            windowed_cache=self.windowed_cache,
        )
        return ops.reshape(output, -1, self.heads * self.head_dim), present_key, present_value

    def read(self, x: Tensor, donor: tuple[Tensor, Tensor], step: Step) -> Tensor:
        """x [T, H] -> attention [T, N * D] (before `o_proj`) over the donor's present K, V [B, K, C, D]."""
        query = repeated(self.query, x, step.batch, step.rope[self.kind])
        if step.nothing is None:
            step.nothing = ops.no_rows(query, self.kv_heads * self.head_dim)
        output = ops.attend_to_cache(
            query,
            *donor,
            step.last_position[self.kind],
            step.total_length[self.kind],
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            window=self.window,
            nothing=step.nothing,
        )
        return ops.reshape(output, -1, self.heads * self.head_dim)


class DecoderLayer(nn.Module):
    inactive: Tensor

    def __init__(self, config: TextConfig, layer: int, windowed_cache: bool) -> None:
        super().__init__()
        hidden, width, eps = config.hidden_size, config.hidden_size_per_layer_input, config.rms_norm_eps
        self.self_attn = Attention(config, layer, windowed_cache)
        self.mlp = MLP(config, layer)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = RMSNorm(hidden, eps)
        self.altup = AltUp(config)
        self.laurel = Laurel(config)
        self.per_layer_input_gate = Linear(hidden, width)
        self.per_layer_projection = Linear(width, hidden)
        self.post_per_layer_input_norm = RMSNorm(hidden, eps)
        inactive = [[float(i > 0)] for i in range(config.altup_num_inputs)]
        self.register_buffer("inactive", torch.tensor([inactive], device="cpu"), persistent=False)

    def before_attention(self, streams: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """streams [T, A, H] and their first, `active` [T, H] -> predictions [T, A, H], and the first, normed [T, H]."""
        predictions = self.altup.predict(streams, active)
        return predictions, self.input_layernorm(predictions[:, 0])

    def after_attention(
        self, predictions: Tensor, normed: Tensor, attention: Tensor, per_layer_input: Tensor
    ) -> tuple[Tensor, Tensor]:
        """attention [T, N * D], per_layer_input [T, P] -> streams [T, A, H] and the first of them [T, H]."""
        attended = self.post_attention_layernorm(self.self_attn.o_proj(attention))
        mixed = ops.add(predictions[:, 0], attended, normed, self.laurel(normed)) * math.sqrt(0.5)
        feedforward = self.mlp(self.pre_feedforward_layernorm(mixed))
        activated = mixed + self.post_feedforward_layernorm(feedforward)
        corrected = self.altup.correct(predictions, activated)

        active = corrected[:, 0]
        gate = self.per_layer_input_gate(self.altup.scale_corrected(active)).float()
        injected = F.gelu(gate, approximate="tanh").type_as(per_layer_input) * per_layer_input
        injected = self.per_layer_projection(injected)
        return corrected + self.inactive * self.post_per_layer_input_norm(injected).unsqueeze(1), active


class Decoder(nn.Module):
    """Embeddings in, logits and updated KV caches out.

    Inputs and outputs of `forward` are those of the graph (see `input_names`, `output_names`):
    `inputs_embeds` [B, S, H]; `per_layer_inputs` [B, S, L * P], the scaled rows of the PLE table;
    `attention_mask` [B, past + S] int64, of which only row sums matter: rows are right-padded;
    `position_ids` [B, S] int64; past K and V [B, K, C, D] for each producing layer. `logits` is
    [B, 1, V] for the last valid position of each row (or [B, S, V]), always fp32.

    With `logits="last"`, the layers above the last KV producer, and that layer from its attention output on, run
    for the last valid position of each row only: no later step reads the other positions.

    Without `windows`, no shape and no scalar that attention reads on the host depends on a value computed on the
    device, and `attention_mask` may be longer than the tokens seen so far.
    """

    def __init__(self, config: TextConfig, logits: Logits, windows: bool = True) -> None:
        super().__init__()
        self.config = config
        self.logits = logits
        self.caches = cache_specs(config, logits, windows)
        hidden, streams, eps = config.hidden_size, config.altup_num_inputs, config.rms_norm_eps
        windowed = {cache.layer for cache in self.caches if cache.windowed}
        self.layers: Sequence[DecoderLayer] = nn.ModuleList(  # type: ignore[assignment]
            DecoderLayer(config, i, i in windowed) for i in range(config.num_layers)
        )
        self.norm = RMSNorm(hidden, eps)
        per_layer = config.num_layers * config.hidden_size_per_layer_input
        self.per_layer_model_projection = Linear(hidden, per_layer)
        self.per_layer_projection_norm = RMSNorm(config.hidden_size_per_layer_input, eps)
        self.altup_projections = nn.ModuleList(Linear(hidden, hidden) for _ in range(streams - 1))
        self.altup_unembed_projections = nn.ModuleList(Linear(hidden, hidden) for _ in range(streams - 1))
        self.lm_head = Linear(hidden, config.vocab_size)
        for kind, theta in config.rope_theta.items():
            exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
            self.register_buffer(f"inverse_frequency_{kind}", 1.0 / theta**exponent, persistent=False)

    @property
    def input_names(self) -> list[str]:
        past = [name for cache in self.caches for name in cache.past]
        return [names.INPUTS_EMBEDS, names.PER_LAYER_INPUTS, names.ATTENTION_MASK, names.POSITION_IDS, *past]

    @property
    def output_names(self) -> list[str]:
        return [names.LOGITS, *(name for cache in self.caches for name in cache.present)]

    def forward(
        self,
        inputs_embeds: Tensor,
        per_layer_inputs: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        batch = ops.size_of_axis(inputs_embeds, 0)
        step = self.step_of(batch, attention_mask, position_ids, past)
        embeds = ops.reshape(inputs_embeds, -1, self.config.hidden_size)
        per_layer = self.mix_per_layer_inputs(embeds, per_layer_inputs)
        layer_inputs = ops.split(per_layer, self.config.num_layers)
        streams, active = self.split_streams(embeds), embeds

        present: list[Tensor] = []
        last_producer = self.config.num_kv_layers - 1
        for i, layer in enumerate(self.layers):
            predictions, normed = repeated(layer.before_attention, streams, active)
            if i <= last_producer:
                pair = (past[2 * i], past[2 * i + 1])
                attention, *pair_out = layer.self_attn.produce(normed, pair, step)
                present += pair_out
            else:
                source = self.config.kv_source(i)
                donor = (present[2 * source], present[2 * source + 1])
                attention = layer.self_attn.read(normed, donor, step)
            if i == last_producer and self.logits == "last":
                last = _last_valid(attention_mask, position_ids, ops.size_of_axis(embeds, 0))
                predictions, normed, attention, per_layer = (
                    x.index_select(0, last) for x in (predictions, normed, attention, per_layer)
                )
                layer_inputs = ops.split(per_layer, self.config.num_layers)
                step = _narrow(step, last)
            streams, active = repeated(layer.after_attention, predictions, normed, attention, layer_inputs[i])

        logits = self.logits_of(streams)
        if self.logits == "last":
            return logits.unsqueeze(1), *present
        return ops.reshape(logits, batch, ops.size_of_axis(inputs_embeds, 1), -1), *present

    def step_of(self, batch: ops.Size, attention_mask: Tensor, position_ids: Tensor, past: Sequence[Tensor]) -> Step:
        """Inputs as in `forward`; `past` may be empty if no cache is windowed."""
        seen = attention_mask.sum(-1)
        last_position = {FULL: (seen - 1).int()}
        total_length = {FULL: ops.size_of_axis(attention_mask, 1).tensor.int()}
        sliding_source = self._sliding_source()
        if sliding_source is not None and self.caches[sliding_source].windowed:
            capacity = ops.size_of_axis(past[2 * sliding_source], 2).tensor
            resident = _resident_length(seen, capacity, self.config.sliding_window)
            last_position[SLIDING] = (resident - 1).int()
            total_length[SLIDING] = resident.amax(0, keepdim=True).int()
        else:
            last_position[SLIDING], total_length[SLIDING] = last_position[FULL], total_length[FULL]
        rope = {}
        for kind in self.config.rope_theta:
            angles = position_ids.unsqueeze(2).float() * getattr(self, f"inverse_frequency_{kind}")
            dtype = self.norm.weight.dtype
            rope[kind] = (angles.cos().to(dtype), angles.sin().to(dtype))
        return Step(batch, rope, last_position, total_length)

    def _sliding_source(self) -> int | None:
        """The donor of the KV-shared sliding layers, if any."""
        config = self.config
        readers = range(config.num_kv_layers, config.num_layers)
        return next((config.kv_source(i) for i in readers if config.layer_types[i] == SLIDING), None)

    def mix_per_layer_inputs(self, embeds: Tensor, rows: Tensor) -> Tensor:
        """embeds [T, H], table rows [B, S, L * P] -> per-layer inputs [T, L * P]."""
        shape = (-1, self.config.num_layers, self.config.hidden_size_per_layer_input)
        projected = self.per_layer_model_projection(embeds) * self.config.hidden_size**-0.5
        normed = self.per_layer_projection_norm(ops.reshape(projected, *shape))
        mixed = (normed + ops.reshape(rows, *shape)) * math.sqrt(0.5)
        return ops.reshape(mixed, -1, projected.shape[1])

    def split_streams(self, embeds: Tensor) -> Tensor:
        """embeds [T, H] -> AltUp streams [T, A, H], rescaled to the magnitude of the first."""
        target = _magnitude(embeds)
        return torch.stack([embeds, *(_rescale(p(embeds), target) for p in self.altup_projections)], dim=1)

    def logits_of(self, streams: Tensor) -> Tensor:
        """AltUp streams [T, A, H] -> capped logits [T, V], fp32."""
        logits = self.lm_head(self.norm(self._merge(streams))).float()
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def _merge(self, streams: Tensor) -> Tensor:
        """AltUp streams [T, A, H] -> hidden [T, H]."""
        first = streams[:, 0]
        target = _magnitude(first)
        others = [_rescale(p(streams[:, i]), target) for i, p in enumerate(self.altup_unembed_projections, start=1)]
        return torch.stack([first, *others], dim=1).mean(1)


def _magnitude(x: Tensor) -> Tensor:
    return x.float().square().mean(-1, keepdim=True).sqrt()


def _rescale(x: Tensor, target: Tensor) -> Tensor:
    wide = x.float()
    magnitude = wide.square().mean(-1, keepdim=True).clamp(min=1e-5).sqrt()
    return (wide * (target / magnitude)).type_as(x)


def _last_valid(attention_mask: Tensor, position_ids: Tensor, tokens: ops.Size) -> Tensor:
    """Flat index [B] of the last token of each row that is not padding, among all `tokens`."""
    column = attention_mask.sum(-1, keepdim=True) - 1 - position_ids[:, :1]
    flat = ops.reshape(ops.count_to(tokens), ops.size_of_axis(position_ids, 0), -1)
    return ops.reshape(flat.gather(1, column), -1)


def _narrow(step: Step, index: Tensor) -> Step:
    """The step for the positions at the flat `index`, as many in each row."""

    def at_index(x: Tensor) -> Tensor:
        return ops.reshape(ops.reshape(x, -1, x.shape[2]).index_select(0, index), step.batch, -1, x.shape[2])

    rope = {kind: (at_index(cos), at_index(sin)) for kind, (cos, sin) in step.rope.items()}
    return Step(step.batch, rope, step.last_position, step.total_length)


def _resident_length(seen: Tensor, capacity: Tensor, window: int) -> Tensor:
    """Rows of a windowed cache that are filled after `seen` [B] tokens; int64 [B].

    A full cache drops `capacity - window + 1` positions at once (the operator's documented layout).
    """
    step = capacity - (window - 1)
    over = (seen - capacity).clamp(min=0)
    return seen - step * ops.integer_divide(over + (step - 1), step)
