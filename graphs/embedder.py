"""Projects encoder features to the decoder's width: `embed_vision` and `embed_audio` of a checkpoint.

transformers' `Gemma3nMultimodalEmbedder`: norm, projection, and a norm without weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import Weight
from .ops import linear, rms_norm


class MultimodalEmbedder(nn.Module):
    """Projects soft tokens (encoder features) and hard tokens (rows of its own table) to [..., text_hidden].

    The decoder takes the results without the factor sqrt(text_hidden) that text embeddings need.
    """

    ones: Tensor

    def __init__(self, vocab_size: int, hidden_size: int, text_hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.embedding = Weight(vocab_size, hidden_size)
        self.hard_embedding_norm = Weight(hidden_size)
        self.soft_embedding_norm = Weight(hidden_size)
        self.embedding_projection = Weight(text_hidden_size, hidden_size)
        self.register_buffer("ones", torch.ones(text_hidden_size, device="cpu"), persistent=False)

    def soft(self, features: Tensor) -> Tensor:
        """features [T, hidden] -> [T, text_hidden]."""
        return self._project(rms_norm(features, self.soft_embedding_norm.weight, self.eps))

    def hard(self, rows: Tensor) -> Tensor:
        """rows [T, hidden] of `embedding.weight` -> [T, text_hidden]."""
        return self._project(rms_norm(rows, self.hard_embedding_norm.weight, self.eps))

    def _project(self, normed: Tensor) -> Tensor:
        return rms_norm(linear(normed, self.embedding_projection.weight), self.ones, self.eps)
