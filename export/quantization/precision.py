"""A precision: how weights are stored, and the dtype that graphs compute in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from gemma3n_onnx.export.errors import ExportOptionError

from .config import PerRow, QuantizationConfig, Storage

DTYPES = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Precision:
    storage: str
    """The dtype in which unquantized weights are stored."""
    compute: str
    """The dtype that the text graphs compute in."""
    weights: QuantizationConfig | None = None
    """The quantization of the decoder's projections."""
    exceptions: Mapping[str, QuantizationConfig] = field(default_factory=dict)
    """Overrides `weights` for projections whose names, without ".weight", end in the key."""
    tokens: QuantizationConfig | None = None
    """The quantization of the token embeddings and of the output head."""
    per_layer: QuantizationConfig | None = None
    """The quantization of the per-layer embeddings."""
    encoders: PerRow | str | None = None
    """The quantization of the encoders' matrix products, or the dtype in which they are stored and computed. Everything
    else in an encoder is computed in fp32."""
    prefill: PerRow | None = None
    """The quantization of the prefill graph's matrix products; None without a prefill graph."""
    device: bool = False
    """The graphs are for an accelerator and minimize synchronization with the host: the decoder includes the argmax,
    and no cache is windowed, because the host would have to track what a windowed cache holds."""

    def __post_init__(self) -> None:
        if (self.tokens is None) != (self.per_layer is None):
            raise ValueError("A recipe quantizes both tables or neither: the embedding graph has one dtype for rows.")
        for dtype in (self.storage, self.compute, self.encoder_products):
            if dtype not in DTYPES:
                raise ValueError(f"{dtype!r} is no dtype of a recipe; choose {', '.join(DTYPES)}.")

    @property
    def encoder_products(self) -> str:
        """The dtype of the encoders' matrix products; fp32 if they are quantized."""
        return self.encoders if isinstance(self.encoders, str) else "fp32"

    def of_encoder(self, name: str, products: Collection[str]) -> Storage:
        """How a tensor of an encoder is stored; `products` are the names of weights of matrix products."""
        if isinstance(self.encoders, PerRow):
            return self.encoders if name in products else self.storage
        return self.encoders or self.storage

    def of_weight(self, name: str, shape: tuple[int, ...]) -> Storage:
        """How a decoder tensor is stored. AltUp coefficients and widths that no block divides stay unquantized."""
        if self.weights is None or len(shape) != 2 or ".altup." in name:
            return self.storage
        module = name.removesuffix(".weight")
        config = next((s for end, s in self.exceptions.items() if module.endswith(end)), self.weights)
        return config.fitting(shape[1]) or self.storage

    def of_table(self, config: QuantizationConfig | None, width: int) -> Storage:
        """How a table with rows of `width` is stored, `config` being `tokens` or `per_layer`.

        Raises:
            ExportOptionError: no block fits into its rows.
        """
        if config is None:
            return self.storage
        if (fitting := config.fitting(width)) is None:
            raise ExportOptionError(
                f"Rows of {width} values cannot be quantized in blocks of {config.block}; choose --precision bf16."
            )
        return fitting
