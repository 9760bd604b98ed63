"""Which precision is stored, computed in, and may run where; the recipes of the quantized ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from gemma3n_onnx.export.errors import ExportOptionError

from .scheme import PerRow, Scheme, Storage

TARGETS = ("cpu", "cuda")
TABLE_BITS = (4, 8)
PREFILLS = ("int8", "shared")
"""Whether prompts have a decoder of their own, in int8, or share the one that answers."""


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

    name: str
    storage: str
    compute: str
    weights: Scheme | None = None
    exceptions: Mapping[str, Scheme] = field(default_factory=dict)
    tokens: Scheme | None = None
    per_layer: Scheme | None = None
    encoders: PerRow | str | None = None
    prefill: PerRow | None = None
    device: bool = False

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
        scheme = next((s for end, s in self.exceptions.items() if module.endswith(end)), self.weights)
        return scheme.fitting(shape[1]) or self.storage

    def of_table(self, scheme: Scheme | None, width: int) -> Storage:
        """How a table with rows of `width` is stored, `scheme` being `tokens` or `per_layer`.

        Raises:
            ExportOptionError: no block fits into its rows.
        """
        if scheme is None:
            return self.storage
        if (fitting := scheme.fitting(width)) is None:
            raise ExportOptionError(
                f"Rows of {width} values cannot be quantized in blocks of {scheme.block}; choose --precision bf16."
            )
        return fitting


@dataclass(frozen=True)
class QuantizationOptions:
    """What replaces a part of a recipe; None leaves it."""

    block: int | None = None
    method: str | None = None
    embedding_bits: int | None = None
    ple_bits: int | None = None
    prefill: str | None = None
    """One of `PREFILLS`."""

    @property
    def given(self) -> dict[str, int | str]:
        """By the names of the command line's options."""
        values = {
            "--prefill": self.prefill,
            "--block-size": self.block,
            "--quantizer": self.method,
            "--embedding-bits": self.embedding_bits,
            "--ple-bits": self.ple_bits,
        }
        return {name: value for name, value in values.items() if value is not None}


_INT4 = Precision(
    "int4",
    storage="fp32",
    compute="fp32",
    weights=Scheme(4, 128, "search"),
    tokens=Scheme(4, 128, "search"),
    per_layer=Scheme(4, 32),
    encoders=PerRow(),
    prefill=PerRow(),
)

# ONNX Runtime 1.31: the CPU provider has no bf16 arithmetic and on x86 none in fp16 that is faster than fp32,
# so narrow weights are widened at load; GroupQueryAttention on CUDA takes fp16 and bf16 only.
_SUPPORTED = {
    ("fp32", "cpu"): Precision("fp32", storage="fp32", compute="fp32"),
    ("fp16", "cpu"): Precision("fp16", storage="fp16", compute="fp32"),
    ("bf16", "cpu"): Precision("bf16", storage="bf16", compute="fp32"),
    ("int8", "cpu"): Precision(
        "int8",
        storage="fp32",
        compute="fp32",
        weights=Scheme(8, 128),
        tokens=Scheme(8, 128),
        per_layer=Scheme(8, 128),
        encoders=PerRow(),
        prefill=PerRow(),
    ),
    ("int4", "cpu"): _INT4,
    # What `--report` finds on the demo: the attention's projections, a sixth of the weights, cost 70 % of the KL.
    ("mixed", "cpu"): replace(
        _INT4, name="mixed", exceptions={f"self_attn.{name}_proj": Scheme(8, 128) for name in "qkvo"}
    ),
    # Encoders in bf16 beside fp16 too, which their feature maps overflow.
    ("fp16", "cuda"): Precision("fp16", storage="fp16", compute="fp16", encoders="bf16", device=True),
    ("bf16", "cuda"): Precision("bf16", storage="bf16", compute="bf16", encoders="bf16", device=True),
    ("int4", "cuda"): replace(_INT4, storage="bf16", compute="bf16", encoders="bf16", prefill=None, device=True),
}
PRECISIONS = tuple(dict.fromkeys(name for name, _ in _SUPPORTED))


def precision_for(name: str, target: str, options: QuantizationOptions | None = None) -> Precision:
    """Raises ExportOptionError, with the precisions that the target runs, for any other combination, and for options
    that fit no quantized precision."""
    if target not in TARGETS:
        raise ExportOptionError(f"Unknown target {target!r}; choose {' or '.join(TARGETS)}.")
    if name not in PRECISIONS:
        raise ExportOptionError(f"Unknown precision {name!r}; choose one of {', '.join(PRECISIONS)}.")
    if (found := _SUPPORTED.get((name, target))) is None:
        usable = ", ".join(p for p, t in _SUPPORTED if t == target)
        raise ExportOptionError(f"Precision {name} does not run on target {target}; choose one of {usable}.")
    return found if options is None else _with_options(found, options)


def _with_options(precision: Precision, options: QuantizationOptions) -> Precision:
    if not options.given:
        return precision
    weights, tokens, per_layer = precision.weights, precision.tokens, precision.per_layer
    if weights is None or tokens is None or per_layer is None:
        quantized = ", ".join(dict.fromkeys(p.name for p in _SUPPORTED.values() if p.weights))
        raise ExportOptionError(
            f"{next(iter(options.given))} is for a quantized --precision ({quantized}), not for {precision.name}."
        )
    for option, bits in (("--embedding-bits", options.embedding_bits), ("--ple-bits", options.ple_bits)):
        if bits is not None and bits not in TABLE_BITS:
            raise ExportOptionError(f"{option} is {bits}; choose one of {', '.join(map(str, TABLE_BITS))}.")

    if options.prefill is not None and options.prefill not in PREFILLS:
        raise ExportOptionError(f"--prefill is {options.prefill!r}; choose {' or '.join(PREFILLS)}.")
    if options.prefill == "int8" and precision.prefill is None:
        raise ExportOptionError("--prefill int8 is for --target cpu; leave it out.")

    def changed(scheme: Scheme) -> Scheme:
        return replace(scheme, block=options.block or scheme.block, method=options.method or scheme.method)

    return replace(
        precision,
        weights=changed(weights),
        exceptions={end: changed(scheme) for end, scheme in precision.exceptions.items()},
        tokens=replace(tokens, block=options.block or tokens.block, bits=options.embedding_bits or tokens.bits),
        per_layer=replace(per_layer, block=options.block or per_layer.block, bits=options.ple_bits or per_layer.bits),
        prefill=None if options.prefill == "shared" else precision.prefill,
    )
