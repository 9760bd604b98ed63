"""Products of transformers that round their activations as the artifact's do.

To int8 with a scale for each block of the weights (MatMulNBits, accuracy_level 4), or for each row on one grid of 255
steps for all of them (DynamicQuantizeMatMul after `graphs.passes.quantize_dynamic`), or to bf16, the result too
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
    """Of a product's input, rows along its last axis, and of its output."""

    input: Round
    output: Round | None = None


def of_storage(storage: Storage) -> Rounding | None:
    """What the product with a weight that is stored so does."""
    if isinstance(storage, QuantizationConfig):
        return Rounding(lambda x: in_blocks(x, storage.block))
    return Rounding(in_rows) if isinstance(storage, PerRow) else None


def in_bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


IN_BF16 = Rounding(in_bf16, in_bf16)


@contextmanager
def rounded(products: Mapping[Any, Rounding | None]) -> Iterator[None]:
    """Meanwhile the `products`, modules, round; rows of a convolution are along axis 1."""
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
    """x [..., K]: the largest magnitude of every `block` values is code 127."""
    groups = x.unflatten(-1, (-1, block))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    return (groups * _inverse(scales)).round().mul(scales).flatten(-2)


def in_rows(x: Tensor) -> Tensor:
    """x [..., K]: rows are divided by their largest magnitude; the range of all, with 0 in it, is 255 steps wide."""
    magnitudes = x.abs().amax(-1, keepdim=True)
    rows = x * _inverse(magnitudes)
    low, high = rows.min().clamp(max=0), rows.max().clamp(min=0)
    scale = (high - low) / 255
    zero = (-low * _inverse(scale)).round()
    codes = (rows * _inverse(scale)).round().add(zero).clamp(0, 255)
    return (codes - zero) * scale * magnitudes


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0.0, 1.0 / scales)
