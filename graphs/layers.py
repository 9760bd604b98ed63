"""Layers shared by decoder, encoders and embedders; parameters have the checkpoint's names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops


class Weight(nn.Module):
    """One parameter, named `<layer>.weight` as in the checkpoint."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))


class Linear(Weight):
    """x [T, in] -> [T, out]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(out_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight)


class RMSNorm(Weight):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size)
        self.eps = eps

    def forward(self, x: Tensor, scale: Tensor | float | None = None) -> Tensor:
        """RMSNorm over the last axis, times `scale`, which is folded into the weight."""
        return ops.rms_norm(x, self.weight if scale is None else self.weight * scale, self.eps)
