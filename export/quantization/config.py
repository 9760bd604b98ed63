"""How a matrix is quantized; `quantize` implements it.

Methods and their sources:
    rtn: symmetric round-to-nearest; the value of largest magnitude gets the lowest code (llama.cpp's Q4_0).
    search: rtn with the scale of least squared error among several candidates, refitted to its codes.
    k-quant: asymmetric; scale and minimum fitted by least squares for several candidate scales, errors weighted by
        magnitude (llama.cpp, "k-quants", pull request 1684).
    hqq: asymmetric; half-quadratic splitting with an l_p norm, p = 0.7 (Badri and Shaji, "Half-Quadratic
        Quantization of Large Machine Learning Models", 2023).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gemma3n_onnx.export.errors import ExportOptionError

BITS = (2, 4, 8)
BLOCKS = (16, 32, 64, 128, 256)
METHODS = ("rtn", "search", "k-quant", "hqq")
_ASYMMETRIC = ("k-quant", "hqq")


@dataclass(frozen=True)
class QuantizationConfig:
    """Blockwise quantization; ExportOptionError for unknown bits, block size or method."""

    bits: int
    block: int
    method: str = "rtn"

    def __post_init__(self) -> None:
        for name, known in (("bits", BITS), ("block", BLOCKS), ("method", METHODS)):
            if getattr(self, name) not in known:
                raise ExportOptionError(
                    f"Quantization with {name} {getattr(self, name)} is not supported; choose one of "
                    f"{', '.join(map(str, known))}."
                )

    @property
    def has_zeros(self) -> bool:
        return self.method in _ASYMMETRIC

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def largest(self) -> int:
        return (1 << self.bits) - 1

    def fitting(self, columns: int) -> QuantizationConfig | None:
        """This config with the largest block size, up to its own, that divides `columns`; None if none does."""
        block = next((size for size in reversed(BLOCKS) if size <= self.block and columns % size == 0), None)
        return None if block is None else replace(self, block=block)

    def __str__(self) -> str:
        return f"int{self.bits} in blocks of {self.block}, {self.method}"


@dataclass(frozen=True)
class PerRow:
    """Symmetric int8 with one scale for each row, rounded to nearest, stored transposed; for products whose activations
    are quantized dynamically."""

    method = "rows"
    bits = 8

    def __str__(self) -> str:
        return "int8 by rows"


Storage = str | QuantizationConfig | PerRow
"""How a tensor is stored: in a dtype, or quantized."""
