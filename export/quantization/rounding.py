"""Rounds activations in transformers' matrix products like the artifact's operators.

To int8 with a scale per block (MatMulNBits, accuracy_level 4); to int8 with rows divided by their magnitude and one
scale for all (DynamicQuantizeMatMul after `graphs.passes.quantize_dynamic`); or to bf16, including the product
(`graphs.passes.narrow_products`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import PerRow, QuantizationConfig, Storage

Round = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rounding:
    """How a product rounds its input, with rows along the last axis, and its output."""

    input: Round
    output: Round | None = None


def of_storage(storage: Storage) -> Rounding | None:
    """The rounding of a product whose weight has this storage."""
    if isinstance(storage, QuantizationConfig):
        return Rounding(lambda x: in_blocks(x, storage.block))
    return Rounding(in_rows) if isinstance(storage, PerRow) else None


def in_bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


IN_BF16 = Rounding(in_bf16, in_bf16)


@contextmanager
def rounded(products: Mapping[Any, Rounding | None]) -> Iterator[None]:
    """In this context the modules in `products` round. Rows of a convolution are along axis 1."""
    hooks = [hook for module, rounding in products.items() if rounding for hook in _hooks(module, rounding)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hooks(module: nn.Module, rounding: Rounding) -> Iterator[Any]:
    axis = 1 if isinstance(module, nn.Conv2d) else -1

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (rounding.input(inputs[0].movedim(axis, -1)).movedim(-1, axis), *inputs[1:])

    yield module.register_forward_pre_hook(before)
    if (after := rounding.output) is not None:
        yield module.register_forward_hook(lambda _, inputs, output: after(output))


def in_blocks(x: Tensor, block: int) -> Tensor:
    """x [..., K] quantized to int8 in blocks and dequantized; the largest magnitude of a block is code 127."""
    groups = x.unflatten(-1, (-1, block))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    return (groups * _inverse(scales)).round().mul(scales).flatten(-2)


def in_rows(x: Tensor) -> Tensor:
    """x [..., K] quantized to uint8 and dequantized: rows divided by their largest magnitude, one scale for all."""
    magnitudes = x.abs().amax(-1, keepdim=True)
    rows = x * _inverse(magnitudes)
    low, high = rows.min().clamp(max=0), rows.max().clamp(min=0)
    scale = (high - low) / 255
    zero = (-low * _inverse(scale)).round()
    codes = (rows * _inverse(scale)).round().add(zero).clamp(0, 255)
    return (codes - zero) * scale * magnitudes


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0.0, 1.0 / scales)
