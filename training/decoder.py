"""The text decoder as it is trained: whole sequences at once, every MatFormer slice cut from the same weights.

Shape legend: B rows, S positions, N targets of all rows, Q of the row with the most, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from gemma3n_onnx.export.slicing import Slice, TensorCut
from gemma3n_onnx.graphs import ops
from gemma3n_onnx.graphs.config import FULL, SLIDING, TextConfig
from gemma3n_onnx.graphs.decoder import Attention, Decoder, Step

TOKENS, PER_LAYER, HEAD = "embed_tokens.weight", "embed_tokens_per_layer.weight", "lm_head.weight"


@dataclass(frozen=True)
class Sequences:
    """Conversations that are trained on at once. A row holds one beginning and several ways to go on from it.

    Attributes:
        ids: [B, S] int64, padded.
        targets: [B, S] int64, the next token where it is to be learned, -1 elsewhere.
        named: [B, S] int64, the things of the picture that a word may mean, as bits, and behind media the question
            that they follow, as one more.
        spoken: [B, S] int64, those that the answer speaks of next; 0 but for targets.
        shows: [B, S] int64, those that a soft token shows, and the bit of a question that media follow.
        branches: [B, S] int64, 0 for the beginning, then the number of the continuation; -1 for padding. A position
            attends to the beginning and its own continuation.
        positions: [B, S] int64, in the conversation that beginning and continuation make.
        features: [n, H] of the soft tokens, in the order in which their ids stand.
    """

    ids: Tensor
    targets: Tensor
    named: Tensor
    spoken: Tensor
    shows: Tensor
    branches: Tensor
    positions: Tensor
    features: Tensor

    @property
    def there(self) -> Tensor:
        """bool [B, S]: what is not padding."""
        return self.branches >= 0

    def visible(self, chosen: Tensor, window: int | None) -> Tensor:
        """chosen int64 [B, Q], indices in a row -> bool [B, 1, Q, S]: what each attends to, always itself."""
        branch, position = (x.gather(1, chosen)[:, :, None] for x in (self.branches, self.positions))
        distance = position - self.positions[:, None]
        related = (self.branches[:, None] == 0) | (self.branches[:, None] == branch)
        near = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        return (related & near)[:, None]


class SequenceDecoder(Decoder):
    """The exported decoder's layers on whole conversations.

    KV-shared layers run at the positions of targets only, as the graph's short tail does at the last one: nothing
    else of them is ever read.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config, "all")

    def forward(  # type: ignore[override]
        self, inputs_embeds: Tensor, per_layer_inputs: Tensor, batch: Sequences
    ) -> tuple[Tensor, list[Tensor]]:
        """inputs_embeds [T, H], per_layer_inputs [T, L * P] of the T tokens of all rows -> logits [N, V] for the N
        targets, row by row, and the losses of `_Lesson`s."""
        wanted = batch.targets >= 0
        everywhere, at_wanted = _Positions.of(batch.there), _Positions.of(wanted)
        lessons = self._lessons(batch, at_wanted)
        taught: list[Tensor] = []

        per_layer = self.mix_per_layer_inputs(inputs_embeds, per_layer_inputs)
        streams, active = self.split_streams(inputs_embeds), inputs_embeds
        of_layer = ops.split(per_layer, self.config.num_layers)
        present: list[tuple[Tensor, Tensor]] = []
        here, (step, visible) = everywhere, self._at(everywhere, batch)
        for i, layer in enumerate(self.layers):
            predictions, normed = layer.before_attention(streams, active)
            own = layer.self_attn
            if i < self.config.num_kv_layers:
                key, value = own.key_and_value(normed, step.batch, step.rope[own.kind])
                present.append((here.pad(key[0]), here.pad(value[0])))
            if i == self.config.num_kv_layers - 1:
                predictions, normed, per_layer = (x[wanted[batch.there]] for x in (predictions, normed, per_layer))
                of_layer = ops.split(per_layer, self.config.num_layers)
                here, (step, visible) = at_wanted, self._at(at_wanted, batch)
            query = here.pad(own.query(normed, step.batch, step.rope[own.kind])[0])
            donor = present[self.config.kv_source(i)]
            if i in lessons:
                taught.append(lessons[i].loss(own, query if here is at_wanted else lessons[i].part_of(query), donor[0]))
            attention = here.unpad(_attend(own, query, *donor, visible[own.kind], here.lengths, everywhere.lengths))
            streams, active = layer.after_attention(predictions, normed, attention, of_layer[i])
        return self.logits_of(streams), taught

    def _at(self, here: _Positions, batch: Sequences) -> tuple[Step, dict[str, Tensor]]:
        """What attention needs at N positions, of a step of one row of N, and what they may see, by kind of layer."""
        row, position = here.place[0], here.index[here.place]
        count = len(row)
        step = self.step_of(
            ops.Size(1, torch.tensor([1])), torch.ones(1, count), batch.positions[row, position][None], []
        )
        windows = {FULL: None, SLIDING: self.config.sliding_window}
        return step, {kind: batch.visible(here.index, window) for kind, window in windows.items()}

    def _lessons(self, batch: Sequences, at_wanted: _Positions) -> dict[int, _Lesson]:
        """By layer, of the first three of full attention: one learns to find what a word names and, behind media, the
        question; two what is to be said of."""
        first, *others = [i for i, kind in enumerate(self.config.layer_types) if kind == FULL][:3]
        lessons: dict[int, _Lesson] = {}
        if batch.spoken.any():
            lessons |= dict.fromkeys(others, _Lesson.of(batch, batch.spoken, at_wanted.index))
        if batch.named.any():
            lessons[first] = _Lesson.of(batch, batch.named, _Positions.of(batch.named > 0).index)
        return lessons


@dataclass(frozen=True)
class _Lesson:
    """What some positions ought to attend to, with the heads of the first K and V: `index` [B, Q], those positions;
    `visible` bool [B, 1, Q, S]; `about` bool [B, Q, T], the things that each should find, no matter what where there
    are none; `shows` bool [B, S, T]."""

    index: Tensor
    visible: Tensor
    about: Tensor
    shows: Tensor

    @classmethod
    def of(cls, batch: Sequences, about: Tensor, index: Tensor) -> _Lesson:
        """about int64 [B, S]: the things that each position should find, as bits."""
        number = torch.arange(int(batch.shows.max()).bit_length())
        at_index, shows = ((bits[:, :, None] >> number) & 1 > 0 for bits in (about.gather(1, index), batch.shows))
        return cls(index, batch.visible(index, None), at_index, shows)

    def part_of(self, query: Tensor) -> Tensor:
        """query [B, S, width] -> [B, Q, width]."""
        return query[torch.arange(len(query))[:, None], self.index]

    def loss(self, attention: Attention, query: Tensor, key: Tensor) -> Tensor:
        """query [B, Q, N * D], key [B, S, K * D] -> mean negative logarithm of the attention to each thing."""
        group = attention.heads // attention.kv_heads
        q = query.unflatten(-1, (-1, attention.head_dim))[:, :, :group].transpose(1, 2)
        k = key.unflatten(-1, (-1, attention.head_dim))[:, :, 0].mT
        weights = (q @ k[:, None]).masked_fill(~self.visible, -torch.inf).softmax(-1)
        to_things = (weights @ self.shows[:, None].float()).mean(1)
        missed = -(to_things + _LEAST_ATTENTION).log() * self.about
        taught = self.about.any(2)
        return (missed.sum(2)[taught] / self.about.sum(2)[taught]).mean()


_LEAST_ATTENTION = 1e-3


@dataclass(frozen=True)
class _Positions:
    """N chosen positions of B rows, side by side in their rows; the shorter rows are filled up to Q.

    `index` [B, Q]: where in the row each is; `place`: row and number in it of each of the N.
    """

    index: Tensor
    place: tuple[Tensor, Tensor]

    @cached_property
    def lengths(self) -> list[int]:
        """How many of each row."""
        return torch.bincount(self.place[0], minlength=len(self.index)).tolist()

    @classmethod
    def of(cls, chosen: Tensor) -> _Positions:
        """chosen bool [B, S]."""
        row, position = chosen.nonzero(as_tuple=True)
        place = row, (chosen.cumsum(1) - 1)[row, position]
        index = torch.zeros(len(chosen), int(place[1].max()) + 1, dtype=torch.int64)
        return cls(index.index_put(place, position), place)

    def pad(self, x: Tensor) -> Tensor:
        """[N, width] -> [B, Q, width]."""
        return x.new_zeros(*self.index.shape, x.shape[1]).index_put(self.place, x)

    def unpad(self, x: Tensor) -> Tensor:
        """[B, Q, width] -> [N, width]."""
        return x[self.place]


def _attend(
    attention: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
) -> Tensor:
    """query [B, Q, N * D], key and value [B, S, K * D], visible [B, 1, Q, S] -> [B, Q, N * D].

    A few rows at a time, without what is padding in all of them: rows come in the order of their lengths.
    """
    q, k, v = (x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for x in (query, key, value))
    parts = []
    for first in range(0, len(q), _ROWS_AT_ONCE):
        some = slice(first, first + _ROWS_AT_ONCE)
        queries, keys = max(query_lengths[some]), max(key_lengths[some])
        attended = F.scaled_dot_product_attention(
            q[some, :, :queries],
            k[some, :, :keys],
            v[some, :, :keys],
            visible[some, :, :queries, :keys],
            scale=1.0,
            enable_gqa=True,
        )
        parts.append(F.pad(attended, (0, 0, 0, q.shape[2] - queries)))
    return torch.cat(parts).transpose(1, 2).flatten(2)


_ROWS_AT_ONCE = 8


class SlicedModel:
    """The decoder of one slice, its weights cut from the whole ones as an export cuts them."""

    def __init__(self, chosen: Slice) -> None:
        self.slice = chosen
        with torch.device("meta"):
            self._decoder = SequenceDecoder(chosen.config)
        self._names = [name for name, _ in self._decoder.named_parameters()]

    def losses(
        self, weights: Mapping[str, Tensor], hard_rows: Tensor, soft_ids: Tensor, batch: Sequences
    ) -> tuple[Tensor, Tensor]:
        """Mean cross entropy of the answers' tokens, and mean loss of what the decoder ought to look at; `hard_rows`
        [n, H] embed the last n ids of the vocabulary."""
        logits, lessons = self._run(weights, hard_rows, soft_ids, batch)
        entropy = F.cross_entropy(logits, batch.targets[batch.targets >= 0])
        return entropy, torch.stack(lessons).mean() if lessons else torch.zeros(())

    def logits(self, weights: Mapping[str, Tensor], hard_rows: Tensor, soft_ids: Tensor, batch: Sequences) -> Tensor:
        """Logits [N, V] for the N targets of the batch, row by row."""
        return self._run(weights, hard_rows, soft_ids, batch)[0]

    def _run(
        self, weights: Mapping[str, Tensor], hard_rows: Tensor, soft_ids: Tensor, batch: Sequences
    ) -> tuple[Tensor, list[Tensor]]:
        config, ids = self.slice.config, batch.ids[batch.there]
        embeds = F.embedding(ids, weights[TOKENS]) * math.sqrt(config.hidden_size)
        first_hard = config.vocab_size - len(hard_rows)
        hard = hard_rows[(ids - first_hard).clamp(min=0)]
        embeds = torch.where((ids >= first_hard)[:, None], hard, embeds)
        embeds = embeds.index_put((torch.isin(ids, soft_ids).nonzero()[:, 0],), batch.features)
        table = _cut(weights[PER_LAYER], self.slice.source_of(PER_LAYER))
        has_row = ids < config.vocab_size_per_layer_input
        rows = F.embedding(torch.where(has_row, ids, 0), table) * math.sqrt(config.hidden_size_per_layer_input)
        own = {
            name: weights[TOKENS] if name == HEAD else _cut(weights[cut.source], cut)
            for name in self._names
            for cut in [self.slice.source_of(name)]
        }
        return functional_call(self._decoder, own, (embeds, rows, batch))


def _cut(weight: Tensor, cut: TensorCut) -> Tensor:
    for axis, ranges in enumerate((cut.rows, cut.columns)):
        if ranges is not None:
            weight = torch.cat([weight.narrow(axis, start, stop - start) for start, stop in ranges], dim=axis)
    return weight


# Branches begin with less than they could add.
_POST_NORM = 0.3
_ATTENTION_LOGIT_STD = 2.5
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
    """Weights to begin with, by their names in a checkpoint."""
    return {name: _initial(name, shape, config, rng).requires_grad_() for name, shape in shapes.items()}


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
