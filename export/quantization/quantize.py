"""Blockwise quantization of matrices, in the layout of MatMulNBits and GatherBlockQuantized.

Each block of a row has a scale and a zero point: value = scale * (code - zero), with codes from 0 to 2^bits - 1. In
symmetric quantization the zero point is 2^(bits - 1).

Shape legend: N rows, K columns, G = K / block groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .config import QuantizationConfig
from .threads import one_thread_an_operation

_AT_ONCE = 1 << 18  # values per work item, to stay in the CPU cache
_SEARCHED = torch.linspace(0.8, 1.1, 7)
_FITTED = torch.linspace(0.8, 1.05, 6)
_HQQ_STEPS, _HQQ_NORM, _HQQ_BETA, _HQQ_GROWTH = 20, 0.7, 10.0, 1.01


@dataclass(frozen=True)
class Quantized:
    """Codes [N, K * bits / 8] uint8, packed, the first value in the low bits; scales [N, G] fp16; zero points
    [N, ceil(G * bits / 8)] uint8, packed alike; None for symmetric quantization."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


def quantize(values: Tensor, config: QuantizationConfig) -> Quantized:
    """values [N, K], K a multiple of the block."""
    rows = max(1, _AT_ONCE // values.shape[1])
    with one_thread_an_operation() as pool:
        parts = [*pool.map(partial(_quantize, config=config), values.split(rows))]
    zeros = torch.cat([part.zeros for part in parts if part.zeros is not None]) if config.has_zeros else None
    return Quantized(torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts]), zeros)


def _quantize(values: Tensor, config: QuantizationConfig) -> Quantized:
    groups = values.float().unflatten(1, (-1, config.block))
    fit = {"rtn": _round, "search": _search, "k-quant": _fit_affine, "hqq": _half_quadratic}[config.method]
    scales, zeros = fit(groups, config)
    scales = scales.half()
    codes = _codes(groups, scales.float(), zeros, config)
    packed_zeros = pack(zeros.squeeze(2).to(torch.uint8), config.bits) if config.has_zeros else None
    return Quantized(pack(codes.to(torch.uint8).flatten(1), config.bits), scales.squeeze(2), packed_zeros)


def dequantize(quantized: Quantized, config: QuantizationConfig) -> Tensor:
    """fp32 [N, K]."""
    groups = quantized.scales.shape[1]
    codes = unpack(quantized.codes, config.bits, groups * config.block).unflatten(1, (groups, -1)).float()
    zeros: Tensor | float = config.middle
    if quantized.zeros is not None:
        zeros = unpack(quantized.zeros, config.bits, groups)[:, :, None].float()
    return ((codes - zeros) * quantized.scales.float()[:, :, None]).flatten(1)


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """values [N, K] -> codes [K, N] int8 and scales [N] fp32: value = scale * code."""
    scales = values.float().abs().amax(1) / 127
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    return (values.float() * inverse[:, None]).round_().to(torch.int8).T.contiguous(), scales


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [N, n] of `bits` each -> uint8 [N, ceil(n * bits / 8)], the first in the low bits."""
    each = 8 // bits
    if each == 1:
        return codes
    filled = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each)).unflatten(1, (-1, each))
    packed = filled[:, :, 0].clone()
    for i in range(1, each):
        packed |= filled[:, :, i] << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`, for `count` codes of a row."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return ((packed[:, :, None] >> shifts) & ((1 << bits) - 1)).flatten(1)[:, :count]


Fit = tuple[Tensor, Tensor]
"""Scales and zero points [N, G, 1]."""


def _codes(groups: Tensor, scales: Tensor, zeros: Tensor, config: QuantizationConfig) -> Tensor:
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    return (groups * inverse).round_().add_(zeros).clamp_(0, config.largest)


def _squared_error(groups: Tensor, scales: Tensor, zeros: Tensor, config: QuantizationConfig) -> Tensor:
    codes = _codes(groups, scales, zeros, config)
    return (codes.sub_(zeros).mul_(scales).sub_(groups)).square_().sum(2, keepdim=True)


def _round(groups: Tensor, config: QuantizationConfig) -> Fit:
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    extreme = torch.where(-low > high, low, high)
    return extreme / -config.middle, torch.full_like(extreme, config.middle)


def _search(groups: Tensor, config: QuantizationConfig) -> Fit:
    largest, middle = _round(groups, config)
    best, least = largest, _squared_error(groups, largest, middle, config)
    for factor in _SEARCHED.tolist():
        for scales in (largest * factor, -largest * factor):
            error = _squared_error(groups, scales, middle, config)
            best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    steps = _codes(groups, best, middle, config) - middle
    square = steps.square().sum(2, keepdim=True)
    refitted = torch.where(square == 0, best, (steps * groups).sum(2, keepdim=True) / square.clamp(min=1))
    error = _squared_error(groups, refitted, middle, config)
    return torch.where(error < least, refitted, best), middle


def _affine(groups: Tensor, config: QuantizationConfig) -> Fit:
    """Maps the range of each group, extended to include 0, to all codes; zero points are not rounded yet."""
    low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
    scales = (high - low) / config.largest
    return scales, torch.where(scales == 0, 0.0, -low / scales)


def _fit_affine(groups: Tensor, config: QuantizationConfig) -> Fit:
    weights = groups.square().mean(2, keepdim=True).sqrt() + groups.abs()
    whole, _ = _affine(groups, config)
    total = weights.sum(2, keepdim=True)
    mean = (weights * groups).sum(2, keepdim=True) / total.clamp(min=1e-30)
    best, best_zeros = _whole(*_affine(groups, config), config)
    least = _weighted_error(groups, best, best_zeros, weights, config)
    for factor in _FITTED.tolist():
        scales = whole * factor
        zeros = torch.where(scales == 0, 0.0, -groups.amin(2, keepdim=True).clamp(max=0) / scales).round()
        codes = _codes(groups, scales, zeros.clamp(0, config.largest), config)
        centred = codes - (weights * codes).sum(2, keepdim=True) / total.clamp(min=1e-30)
        square = (weights * centred.square()).sum(2, keepdim=True)
        slope = (weights * centred * (groups - mean)).sum(2, keepdim=True) / square.clamp(min=1e-30)
        offset = mean - slope * (codes - centred).mean(2, keepdim=True)
        usable = (square > 0) & (slope > 0)
        fitted = torch.where(usable, slope, scales)
        fitted_zeros = torch.where(usable, -offset / slope.clamp(min=1e-30), zeros)
        fitted, fitted_zeros = _whole(fitted, fitted_zeros, config)
        error = _weighted_error(groups, fitted, fitted_zeros, weights, config)
        better = error < least
        best, best_zeros = torch.where(better, fitted, best), torch.where(better, fitted_zeros, best_zeros)
        least = torch.minimum(error, least)
    return best, best_zeros


def _weighted_error(
    groups: Tensor, scales: Tensor, zeros: Tensor, weights: Tensor, config: QuantizationConfig
) -> Tensor:
    codes = _codes(groups, scales, zeros, config)
    return (codes.sub_(zeros).mul_(scales).sub_(groups)).square_().mul_(weights).sum(2, keepdim=True)


def _half_quadratic(groups: Tensor, config: QuantizationConfig) -> Fit:
    scales, zeros = _affine(groups, config)
    safe = torch.where(scales == 0, 1.0, scales)
    first = _whole(scales, zeros, config)
    least = _norm_of_error(groups, *first, config)
    best_zeros = first[1]
    beta = _HQQ_BETA
    for _ in range(_HQQ_STEPS):
        codes = (groups / safe + zeros).round().clamp(0, config.largest)
        error = groups - (codes - zeros) * safe
        size = error.abs()
        shrunk = error.sign() * (size - size.clamp(min=1e-8).pow(_HQQ_NORM - 1) / beta).clamp(min=0)
        zeros = (codes - (groups - shrunk) / safe).mean(2, keepdim=True)
        beta *= _HQQ_GROWTH
        whole = zeros.round().clamp(0, config.largest)
        found = _norm_of_error(groups, scales, whole, config)
        best_zeros, least = torch.where(found < least, whole, best_zeros), torch.minimum(found, least)
    return scales, best_zeros


def _norm_of_error(groups: Tensor, scales: Tensor, zeros: Tensor, config: QuantizationConfig) -> Tensor:
    codes = _codes(groups, scales, zeros, config)
    return codes.sub_(zeros).mul_(scales).sub_(groups).abs_().pow_(_HQQ_NORM).sum(2, keepdim=True)


def _whole(scales: Tensor, zeros: Tensor, config: QuantizationConfig) -> Fit:
    return scales, zeros.round().clamp(0, config.largest)
