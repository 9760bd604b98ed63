"""Token ids to the decoder's two inputs, for consumers that do not read the tables themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import TextConfig


class Embedding(nn.Module):
    """`input_ids` [B, S] int64 -> `inputs_embeds` [B, S, H] and `per_layer_inputs` [B, S, L * P].

    The tables may be narrower than `compute`, the outputs' dtype: rows are widened, never a table. The PLE
    table holds rows that are already scaled; an id without a row reads row 0.
    """

    def __init__(self, config: TextConfig, compute: torch.dtype) -> None:
        super().__init__()
        self.compute = compute
        self.scale = config.hidden_size**0.5
        self.per_layer_rows = config.vocab_size_per_layer_input
        self.embed_tokens = Table(config.vocab_size, config.hidden_size)
        self.embed_tokens_per_layer = Table(self.per_layer_rows, config.num_layers * config.hidden_size_per_layer_input)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        has_row = (input_ids >= 0) & (input_ids < self.per_layer_rows)
        return (
            self.embed_tokens(input_ids).to(self.compute) * self.scale,
            self.embed_tokens_per_layer(torch.where(has_row, input_ids, 0)).to(self.compute),
        )


class Table(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)
