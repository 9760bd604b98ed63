"""Classes as directions of the decoder's embedding space: the soft token of a red circle is near those words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .prompts import ConversationEncoder

SHARPNESS = 1.5
"""Of a classifier: what its logits are for a feature vector, per unit of the vector's part along a class."""


class WordClassifier:
    """A classifier that is not trained: class i is the embedding of the word `names[i]`, or, where that is None, a
    random direction. What it classifies must come to lie along these."""

    def __init__(
        self, names: Sequence[str | None], embeddings: Tensor, encoder: ConversationEncoder, rng: torch.Generator
    ) -> None:
        """`embeddings` [V, H]: of the decoder's tokens, of which every name must be one when a space is before it."""
        rows = [
            torch.randn(embeddings.shape[1], generator=rng) if name is None else embeddings[encoder.word_id(name)]
            for name in names
        ]
        self._directions = SHARPNESS * F.normalize(torch.stack(rows).detach(), dim=1)

    def __call__(self, features: Tensor) -> Tensor:
        """features [n, H] -> logits [n, classes]."""
        return features @ self._directions.T


Words = Callable[[Sequence[str | None]], WordClassifier]
