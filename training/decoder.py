"""The text decoder as it is trained: whole sequences at once, every MatFormer slice cut from the same weights.

Shape legend: B sequences, S positions, N chosen positions of all sequences, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from gemma3n_onnx.export.slicing import Slice, TensorCut
from gemma3n_onnx.graphs import ops
from gemma3n_onnx.graphs.config import TextConfig
from gemma3n_onnx.graphs.decoder import Attention, Decoder

TOKENS, PER_LAYER, HEAD = "embed_tokens.weight", "embed_tokens_per_layer.weight", "lm_head.weight"


@dataclass(frozen=True)
class Sequences:
    """A batch of padded conversations: `ids` [B, S], `targets` [B, S] the next token where it is to be learned and
    -1 elsewhere, `lengths` [B], `features` [n, H] of the soft tokens in the order in which their ids stand."""

    ids: Tensor
    targets: Tensor
    lengths: Tensor
    features: Tensor


class SequenceDecoder(Decoder):
    """The exported decoder's layers on whole sequences, padded on the right.

    KV-shared layers run at chosen positions only, as the graph's short tail does at the last one: nothing else of
    them is ever read.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config, "all")

    def forward(  # type: ignore[override]
        self, inputs_embeds: Tensor, per_layer_inputs: Tensor, lengths: Tensor, chosen: Tensor
    ) -> Tensor:
        """inputs_embeds [B, S, H], per_layer_inputs [B, S, L * P], lengths int64 [B], chosen bool [B, S] -> logits
        [N, V] of the N chosen positions, row by row."""
        batch, length, hidden = inputs_embeds.shape
        mask = (torch.arange(length) < lengths[:, None]).long()
        step = self._step(ops.size_of_axis(inputs_embeds, 0), mask, torch.arange(length).expand(batch, -1), [])
        embeds = inputs_embeds.reshape(-1, hidden)
        per_layer = self._per_layer_inputs(embeds, per_layer_inputs)
        streams = self._split(embeds)
        present: list[tuple[Tensor, Tensor]] = []
        at_chosen = {kind: (cos[chosen], sin[chosen]) for kind, (cos, sin) in step.rope.items()}
        for i, layer in enumerate(self.layers):
            predictions, normed = layer.before_attention(streams)
            if i < self.config.num_kv_layers:
                attention, key, value = layer.self_attn.produce(normed, (embeds, embeds), step)
                present.append((key, value))
            else:
                attention = self._read(layer.self_attn, normed, present[self.config.kv_source(i)], at_chosen, chosen)
            if i == self.config.num_kv_layers - 1:
                index = chosen.flatten().nonzero()[:, 0]
                predictions, normed, attention, per_layer = (
                    x[index] for x in (predictions, normed, attention, per_layer)
                )
            streams = layer.after_attention(predictions, normed, attention, per_layer[:, i])
        logits = self.lm_head(self.norm(self._merge(streams)))
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def _read(
        self,
        attention: Attention,
        x: Tensor,
        donor: tuple[Tensor, Tensor],
        rope: dict[str, tuple[Tensor, Tensor]],
        chosen: Tensor,
    ) -> Tensor:
        """x [N, H] at the chosen positions -> attention [N, heads * D] over the donor's K and V."""
        cos, sin = (part[None] for part in rope[attention.kind])
        normed = attention.heads_of(attention.q_proj(x), attention.q_norm.weight, ops.Size(1, torch.tensor([1])))
        query = ops.rotary_embedding(normed, cos, sin, attention.heads)[0]
        # Queries of a row side by side, the shorter rows filled up.
        row, position = chosen.nonzero(as_tuple=True)
        place = (chosen.cumsum(1) - 1)[row, position]
        padded = query.new_zeros(len(chosen), int(place.max()) + 1, query.shape[1]).index_put((row, place), query)
        own = torch.zeros(padded.shape[:2], dtype=torch.int64).index_put((row, place), position)
        output = ops.attend_at(
            padded,
            *donor,
            own,
            num_heads=attention.heads,
            num_kv_heads=attention.kv_heads,
            window=attention.window,
        )
        return output[row, place]


class SlicedModel:
    """The decoder of one slice, its weights cut from the whole ones as an export cuts them."""

    def __init__(self, chosen: Slice) -> None:
        self.slice = chosen
        with torch.device("meta"):
            self._decoder = SequenceDecoder(chosen.config)
        self._names = [name for name, _ in self._decoder.named_parameters()]

    def loss(self, weights: Mapping[str, Tensor], hard_rows: Tensor, soft_ids: Tensor, batch: Sequences) -> Tensor:
        """Mean cross entropy of the answers' tokens; `hard_rows` [n, H] embed the last n ids of the vocabulary."""
        logits = self.logits(weights, hard_rows, soft_ids, batch)
        return F.cross_entropy(logits, batch.targets[batch.targets >= 0])

    def logits(self, weights: Mapping[str, Tensor], hard_rows: Tensor, soft_ids: Tensor, batch: Sequences) -> Tensor:
        """Logits [N, V] for the N targets of the batch, row by row."""
        config = self.slice.config
        embeds = F.embedding(batch.ids, weights[TOKENS]) * math.sqrt(config.hidden_size)
        first_hard = config.vocab_size - len(hard_rows)
        is_hard = batch.ids >= first_hard
        embeds = torch.where(is_hard[:, :, None], hard_rows[(batch.ids - first_hard).clamp(min=0)], embeds)
        is_soft = torch.isin(batch.ids, soft_ids)
        embeds = embeds.index_put(is_soft.nonzero(as_tuple=True), batch.features)
        table = _cut(weights[PER_LAYER], self.slice.source_of(PER_LAYER))
        has_row = batch.ids < config.vocab_size_per_layer_input
        rows = F.embedding(torch.where(has_row, batch.ids, 0), table) * math.sqrt(config.hidden_size_per_layer_input)
        own = {
            name: weights[TOKENS] if name == HEAD else _cut(weights[cut.source], cut)
            for name in self._names
            for cut in [self.slice.source_of(name)]
        }
        return functional_call(self._decoder, own, (embeds, rows, batch.lengths, batch.targets >= 0))


def _cut(weight: Tensor, cut: TensorCut) -> Tensor:
    for axis, ranges in enumerate((cut.rows, cut.columns)):
        if ranges is not None:
            weight = torch.cat([weight.narrow(axis, start, stop - start) for start, stop in ranges], dim=axis)
    return weight


# Branches begin with less than they could add; queries and keys begin with attention that is nearly even.
_POST_NORM = 0.3
_ATTENTION_LOGIT_STD = 1.4
_ALTUP_STD = 0.02
_POST_NORMS = (
    "post_attention_layernorm",
    "post_feedforward_layernorm",
    "post_laurel_norm",
    "post_per_layer_input_norm",
)


def initial_weights(
    shapes: Mapping[str, tuple[int, ...]], config: TextConfig, rng: torch.Generator
) -> dict[str, Tensor]:
    """Weights to begin with. Attention begins by looking for what is like the own position, and by copying it:
    queries as keys, outputs as values transposed."""
    weights = {name: _initial(name, shape, config, rng) for name, shape in shapes.items()}
    group = config.num_heads // config.num_kv_heads
    for layer in range(config.num_layers):
        of_layer, of_donor = (f"layers.{i}.self_attn" for i in (layer, config.kv_source(layer)))
        key, value = (
            weights[f"{of_donor}.{name}.weight"].unflatten(0, (config.num_kv_heads, -1)).repeat_interleave(group, 0)
            for name in ("k_proj", "v_proj")
        )
        weights[f"{of_layer}.q_proj.weight"] = key.flatten(0, 1)
        weights[f"{of_layer}.o_proj.weight"] = value.flatten(0, 1).T.contiguous()
    return {name: tensor.requires_grad_() for name, tensor in weights.items()}


def _initial(name: str, shape: tuple[int, ...], config: TextConfig, rng: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=rng)
    match name.removesuffix(".weight").rpartition(".")[2]:
        case "embed_tokens":
            return values * config.hidden_size**-0.5
        case "embed_tokens_per_layer":
            return values * config.hidden_size_per_layer_input**-0.5
        case "q_norm" | "k_norm":
            return torch.full(shape, math.sqrt(_ATTENTION_LOGIT_STD / math.sqrt(config.head_dim)))
        case "correction_coefs" | "prediction_coefs":
            return values * _ALTUP_STD
        case "modality_router":
            return values * config.hidden_size**0.5
        case kind if len(shape) == 1:
            return torch.full(shape, _POST_NORM if kind in _POST_NORMS else 1.0)
        case _:
            return values * shape[1] ** -0.5
