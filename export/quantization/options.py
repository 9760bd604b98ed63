"""Command-line options that override parts of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gemma3n_onnx.export.errors import ExportOptionError

from .config import QuantizationConfig
from .precision import Precision

TABLE_BITS = (4, 8)
PREFILLS = ("int8", "shared")
"""Prompts run in a separate int8 prefill graph, or in the decoder graph."""


@dataclass(frozen=True)
class QuantizationOptions:
    """None leaves the recipe's value."""

    block: int | None = None
    method: str | None = None
    embedding_bits: int | None = None
    ple_bits: int | None = None
    prefill: str | None = None
    """One of `PREFILLS`."""

    @property
    def given(self) -> dict[str, int | str]:
        """The options that are set, by their names on the command line."""
        values = {
            "--prefill": self.prefill,
            "--block-size": self.block,
            "--quantizer": self.method,
            "--embedding-bits": self.embedding_bits,
            "--ple-bits": self.ple_bits,
        }
        return {name: value for name, value in values.items() if value is not None}

    def apply(self, precision: Precision) -> Precision:
        """The quantized `precision`, with the given options applied.

        Raises:
            ExportOptionError: an option has an unknown value, or the precision has no such part.
        """
        self._check(precision)

        def changed(
            config: QuantizationConfig, bits: int | None = None, method: str | None = None
        ) -> QuantizationConfig:
            return replace(
                config, bits=bits or config.bits, block=self.block or config.block, method=method or config.method
            )

        weights, tokens, per_layer = precision.weights, precision.tokens, precision.per_layer
        return replace(
            precision,
            weights=weights and changed(weights, method=self.method),
            exceptions={suffix: changed(s, method=self.method) for suffix, s in precision.exceptions.items()},
            tokens=tokens and changed(tokens, self.embedding_bits),
            per_layer=per_layer and changed(per_layer, self.ple_bits),
            prefill=None if self.prefill == "shared" else precision.prefill,
        )

    def _check(self, precision: Precision) -> None:
        for option, bits, table in (
            ("--embedding-bits", self.embedding_bits, precision.tokens),
            ("--ple-bits", self.ple_bits, precision.per_layer),
        ):
            if bits is not None and bits not in TABLE_BITS:
                raise ExportOptionError(f"{option} is {bits}; choose one of {', '.join(map(str, TABLE_BITS))}.")
            if bits is not None and table is None:
                raise ExportOptionError(f"{option} needs a --precision that quantizes this table; leave it out.")
        if self.prefill is not None and self.prefill not in PREFILLS:
            raise ExportOptionError(f"--prefill is {self.prefill!r}; choose {' or '.join(PREFILLS)}.")
        if self.prefill == "int8" and precision.prefill is None:
            raise ExportOptionError("--prefill int8 needs --target cpu; leave it out.")
