"""Products of transformers that take their activations in int8, as the artifact's quantized products do.

Rounded to int8 and back, the activations are those that ONNX Runtime's kernels multiply: with a scale for each block of
the weights (MatMulNBits, accuracy_level 4), or for each row, on one grid of 255 steps for all of them
(DynamicQuantizeMatMul after `graphs.passes.quantize_dynamic`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .scheme import PerRow, Scheme, Storage

Rounding = Callable[[Tensor], Tensor]


@contextmanager
def int8_activations(products: Mapping[Any, Storage]) -> Iterator[None]:
    """Meanwhile, those of `products`, modules, that are stored quantized round their input; rows of a convolution are
    along axis 1."""
    hooks = [
        module.register_forward_pre_hook(_on_input(module, rounding))
        for module, storage in products.items()
        if (rounding := _rounding(storage)) is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rounding(storage: Storage) -> Rounding | None:
    if isinstance(storage, Scheme):
        return lambda x: in_blocks(x, storage.block)
    return in_rows if isinstance(storage, PerRow) else None


def _on_input(module: nn.Module, rounding: Rounding) -> Callable[..., Any]:
    axis = 1 if isinstance(module, nn.Conv2d) else -1

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (rounding(inputs[0].movedim(axis, -1)).movedim(-1, axis), *inputs[1:])

    return hook


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
