"""The embedding graph, for consumers that do not read the embedding tables directly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import TextConfig
from .ops import replace_rows, reshape, size_of_axis


@dataclass(frozen=True)
class HardRows:
    """Rows of all ids from `first_id`, the first hard multimodal token, on; they follow the `vocab_size` rows of the
    table. Ids above the hard tokens have been added to the vocabulary: their rows are copies."""

    first_id: int
    count: int


class Embedding(nn.Module):
    """`input_ids` [B, S] int64 -> `inputs_embeds` [B, S, H] and `per_layer_inputs` [B, S, L * P].

    Each of `soft_token_ids` has an input of features [n, H] fp32. They replace the embeddings of that token in
    order; empty features leave the token's own embedding. The tables may be stored in a narrower dtype than
    `compute`, the outputs' dtype: only gathered rows are cast. PLE rows are stored scaled; an id without a row
    reads row 0.
    """

    def __init__(
        self,
        config: TextConfig,
        compute: torch.dtype,
        hard_rows: HardRows | None = None,
        soft_token_ids: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.compute, self.hard_rows, self.soft_token_ids = compute, hard_rows, soft_token_ids
        self.scale = config.hidden_size**0.5
        self.per_layer_rows = config.vocab_size_per_layer_input
        rows = config.vocab_size + (hard_rows.count if hard_rows else 0)
        self.embed_tokens = EmbeddingLookup(rows, config.hidden_size)
        self.embed_tokens_per_layer = EmbeddingLookup(
            self.per_layer_rows, config.num_layers * config.hidden_size_per_layer_input
        )

    def forward(self, input_ids: Tensor, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        rows = input_ids
        if self.hard_rows is not None:
            rows = torch.where(input_ids >= self.hard_rows.first_id, input_ids + self.hard_rows.count, input_ids)
        embeds = self.embed_tokens(rows).to(self.compute) * self.scale
        if features:
            batch, length = size_of_axis(input_ids, 0), size_of_axis(input_ids, 1)
            flat, ids = reshape(embeds, -1, embeds.shape[-1]), reshape(input_ids, -1)
            for token_id, soft_rows in zip(self.soft_token_ids, features, strict=True):
                flat = replace_rows(flat, ids == token_id, soft_rows.to(self.compute))
            embeds = reshape(flat, batch, length, embeds.shape[-1])
        has_row = (input_ids >= 0) & (input_ids < self.per_layer_rows)
        return embeds, self.embed_tokens_per_layer(torch.where(has_row, input_ids, 0)).to(self.compute)


class EmbeddingLookup(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)
