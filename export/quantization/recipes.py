"""The table of precisions: the values of `--precision`, by target."""

from __future__ import annotations

from dataclasses import replace

from gemma3n_onnx.export.errors import ExportOptionError

from .config import PerRow, QuantizationConfig
from .options import QuantizationOptions
from .precision import Precision

TARGETS = ("cpu", "cuda")
DEFAULTS = {"cpu": "fp32", "cuda": "bf16"}
"""The precision of an export that names none, by target."""

_INT4 = Precision(
    storage="fp32",
    compute="fp32",
    weights=QuantizationConfig(4, 128, "search"),
    tokens=QuantizationConfig(4, 128, "search"),
    per_layer=QuantizationConfig(4, 32),
    encoders=PerRow(),
    prefill=PerRow(),
)

# ONNX Runtime 1.31: the CPU provider does not compute in bf16, and on x86 its fp16 is not faster than fp32, so fp16
# and bf16 weights are widened at load. GroupQueryAttention on CUDA supports only fp16 and bf16. On CUDA the encoders'
# products are in bf16 even with an fp16 decoder, because their feature maps overflow fp16.
RECIPES: dict[str, dict[str, Precision]] = {
    "fp32": {"cpu": Precision(storage="fp32", compute="fp32")},
    "fp16": {
        "cpu": Precision(storage="fp16", compute="fp32"),
        "cuda": Precision(storage="fp16", compute="fp16", encoders="bf16", device=True),
    },
    "bf16": {
        "cpu": Precision(storage="bf16", compute="fp32"),
        "cuda": Precision(storage="bf16", compute="bf16", encoders="bf16", device=True),
    },
    "int8": {
        "cpu": Precision(
            storage="fp32",
            compute="fp32",
            weights=QuantizationConfig(8, 128),
            tokens=QuantizationConfig(8, 128),
            per_layer=QuantizationConfig(8, 128),
            encoders=PerRow(),
            prefill=PerRow(),
        ),
    },
    # `--report` on the demo: the attention projections are a sixth of the weights and cause 70 % of the KL divergence.
    "mixed": {
        "cpu": replace(_INT4, exceptions={f"self_attn.{name}_proj": QuantizationConfig(8, 128) for name in "qkvo"}),
    },
    "int4": {
        "cpu": _INT4,
        "cuda": replace(_INT4, storage="bf16", compute="bf16", encoders="bf16", prefill=None, device=True),
    },
}
"""By name, then by target. A new precision is one entry."""


def default_precision(target: str) -> str:
    """Raises ExportOptionError for an unknown target."""
    _check_target(target)
    return DEFAULTS[target]


def _check_target(target: str) -> None:
    if target not in TARGETS:
        raise ExportOptionError(f"Unknown target {target!r}; choose {' or '.join(TARGETS)}.")


def precision_for(name: str, target: str, options: QuantizationOptions | None = None) -> Precision:
    """The recipe with `options` applied.

    Raises:
        ExportOptionError: unknown name or target, no such precision on the target, or options that do not apply to it.
    """
    _check_target(target)
    if name not in RECIPES:
        raise ExportOptionError(f"Unknown precision {name!r}; choose one of {', '.join(RECIPES)}.")
    if (precision := RECIPES[name].get(target)) is None:
        usable = ", ".join(other for other, targets in RECIPES.items() if target in targets)
        raise ExportOptionError(f"Precision {name} does not run on target {target}; choose one of {usable}.")
    if options is None or not options.given:
        return precision
    if precision.weights is None:
        quantized = (other for other, targets in RECIPES.items() if any(each.weights for each in targets.values()))
        raise ExportOptionError(
            f"{next(iter(options.given))} needs a quantized --precision ({', '.join(quantized)}), not {name}."
        )
    return options.apply(precision)
