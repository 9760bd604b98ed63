"""What a precision stores and computes in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from gemma3n_onnx.export.errors import ExportOptionError

from .config import PerRow, QuantizationConfig, Storage


@dataclass(frozen=True)
class Precision:
    """`storage` is the dtype of the weights on disk that `weights`, `tokens` and `per_layer` do not quantize, `compute`
    that of the graphs' arithmetic.

    `weights` quantizes the decoder's projections, but those of `exceptions`, by the ends of their names without
    ".weight"; `tokens` the token embeddings, which are the output head too; `per_layer` the per-layer embeddings;
    `prefill` the products of a second decoder, for prompts. `encoders` quantizes the products of the encoders, or is
    the dtype that they are computed in and all weights are stored in; what is between them is computed in fp32.

    `device`: the graphs are for one that the host is to wait for as little as may be. The decoder then chooses the
    likeliest token itself, and all caches have one length: those of windows would have the host know what they hold.
    """

    storage: str
    compute: str
    weights: QuantizationConfig | None = None
    exceptions: Mapping[str, QuantizationConfig] = field(default_factory=dict)
    tokens: QuantizationConfig | None = None
    per_layer: QuantizationConfig | None = None
    encoders: PerRow | str | None = None
    prefill: PerRow | None = None
    device: bool = False

    def __post_init__(self) -> None:
        if (self.tokens is None) != (self.per_layer is None):
            raise ValueError("A recipe quantizes both tables or neither: the embedding graph has one dtype for rows.")

    @property
    def encoder_products(self) -> str:
        """The dtype that products of the encoders are computed in, but for activations in int8."""
        return self.encoders if isinstance(self.encoders, str) else "fp32"

    def of_encoder(self, name: str, products: Collection[str]) -> Storage:
        """How a tensor of an encoder is stored; `products` are those that are weights of products only."""
        if isinstance(self.encoders, PerRow):
            return self.encoders if name in products else self.storage
        return self.encoders or self.storage

    def of_weight(self, name: str, shape: tuple[int, ...]) -> Storage:
        """How a tensor of the decoder is stored. AltUp's few coefficients and what has no blocks stay as they are."""
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
