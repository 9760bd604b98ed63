"""The text decoder as it is trained: whole sequences at once, every MatFormer slice cut from the same weights.

Shape legend: B sequences, S positions, A answered positions at the end of a sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from gemma3n_onnx.export.slicing import Slice, TensorCut
from gemma3n_onnx.graphs import ops
from gemma3n_onnx.graphs.config import TextConfig
from gemma3n_onnx.graphs.decoder import Decoder, Step

TOKENS, PER_LAYER, HEAD = "embed_tokens.weight", "embed_tokens_per_layer.weight", "lm_head.weight"


class SequenceDecoder(Decoder):
    """The exported decoder's layers on whole sequences, padded on the right.

    KV-shared layers run for the last `answered` positions of each sequence only, as the graph's short tail does for
    the last one: nothing else of them is ever read.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config, "all")

    def forward(  # type: ignore[override]
        self, inputs_embeds: Tensor, per_layer_inputs: Tensor, lengths: Tensor, answered: int
    ) -> Tensor:
        """inputs_embeds [B, S, H], per_layer_inputs [B, S, L * P], lengths int64 [B] -> logits [B, answered, V].

        Every sequence is longer than `answered`, or what comes out for positions before its first is meaningless.
        """
        batch, length, hidden = inputs_embeds.shape
        mask = (torch.arange(length) < lengths[:, None]).long()
        step = self._step(ops.size_of_axis(inputs_embeds, 0), mask, torch.arange(length).expand(batch, -1), [])
        embeds = inputs_embeds.reshape(-1, hidden)
        per_layer = self._per_layer_inputs(embeds, per_layer_inputs)
        streams = self._split(embeds)
        present: list[tuple[Tensor, Tensor]] = []
        nothing = (embeds, embeds)
        for i, layer in enumerate(self.layers):
            predictions, normed = layer.before_attention(streams)
            if i < self.config.num_kv_layers:
                attention, *pair = layer.self_attn.produce(normed, nothing, step)
                present.append((pair[0], pair[1]))
            else:
                attention = layer.self_attn.read(normed, present[self.config.kv_source(i)], step)
            if i == self.config.num_kv_layers - 1:
                positions = (lengths[:, None] - answered + torch.arange(answered)).clamp(min=0)
                index = (torch.arange(batch)[:, None] * length + positions).flatten()
                predictions, normed, attention, per_layer = (
                    x[index] for x in (predictions, normed, attention, per_layer)
                )
                step = _at_positions(step, positions)
            streams = layer.after_attention(predictions, normed, attention, per_layer[:, i])
        logits = self.lm_head(self.norm(self._merge(streams)))
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits.reshape(batch, answered, -1)


def _at_positions(step: Step, positions: Tensor) -> Step:
    """The step of positions [B, A]."""

    def taken(x: Tensor) -> Tensor:
        return x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2]))

    return replace(step, rope={kind: (taken(cos), taken(sin)) for kind, (cos, sin) in step.rope.items()})


@dataclass(frozen=True)
class Sequences:
    """A batch of padded conversations: `ids` [B, S], `targets` [B, S] the next token where it is to be learned and
    -1 elsewhere, `features` [n, H] of the soft tokens in the order in which their ids stand."""

    ids: Tensor
    targets: Tensor
    lengths: Tensor
    answered: int
    features: Tensor


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
        positions = (batch.lengths[:, None] - batch.answered + torch.arange(batch.answered)).clamp(min=0)
        targets = batch.targets.gather(1, positions)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def logits(self, weights: Mapping[str, Tensor], hard_rows: Tensor, soft_ids: Tensor, batch: Sequences) -> Tensor:
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
        return functional_call(self._decoder, own, (embeds, rows, batch.lengths, batch.answered))


def _cut(weight: Tensor, cut: TensorCut) -> Tensor:
    for axis, ranges in enumerate((cut.rows, cut.columns)):
        if ranges is not None:
            weight = torch.cat([weight.narrow(axis, start, stop - start) for start, stop in ranges], dim=axis)
    return weight


def initial_weights(
    shapes: Mapping[str, tuple[int, ...]], config: TextConfig, rng: torch.Generator
) -> dict[str, Tensor]:
    """Weights to begin with: branches add half of what they could, queries and keys begin with flat attention."""
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=rng)
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if kind in ("embed_tokens",):
            values *= config.hidden_size**-0.5
        elif kind == "embed_tokens_per_layer":
            values *= config.hidden_size_per_layer_input**-0.5
        elif kind in ("q_norm", "k_norm"):
            values = torch.full(shape, math.sqrt(1.4 / math.sqrt(config.head_dim)))
        elif kind in (
            "post_attention_layernorm",
            "post_feedforward_layernorm",
            "post_laurel_norm",
            "post_per_layer_input_norm",
        ):
            values = torch.full(shape, 0.3)
        elif kind in ("correction_coefs", "prediction_coefs"):
            values *= 0.02
        elif kind == "modality_router":
            values *= math.sqrt(config.hidden_size)
        elif len(shape) == 1:
            values = torch.ones(shape)
        else:
            values *= shape[1] ** -0.5
        weights[name] = values.requires_grad_()
    return weights
