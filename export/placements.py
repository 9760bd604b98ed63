"""The text part of an artifact: which tensors there are, how each is stored, and where in which file it lies."""

from __future__ import annotations

from collections.abc import Mapping

from gemma3n_onnx.graphs.config import TextConfig
from gemma3n_onnx.graphs.embedding import HardRows

from . import trace
from .quantization.precision import Precision
from .weights import AnyPlacement, QuantizedPlacement, RowsPlacement, TablePlacement, lay_out

TOKENS, PER_LAYER = "embed_tokens.weight", "embed_tokens_per_layer.weight"
DECODER_DATA, PREFILL_DATA = "decoder.onnx.data", "prefill.onnx.data"
TOKEN_TABLE, PER_LAYER_TABLE = "token_embeddings.bin", "per_layer_embeddings.bin"

Placements = Mapping[str, AnyPlacement]
"""Where each tensor lies, by its name in the checkpoint."""


def tensor_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a text decoder, tables included; the tied head is no tensor of its own."""
    shapes = trace.parameter_shapes(config)
    shapes[TOKENS] = shapes.pop("lm_head.weight")
    width = config.num_layers * config.hidden_size_per_layer_input
    shapes[PER_LAYER] = (config.vocab_size_per_layer_input, width)
    return shapes


def text_placements(config: TextConfig, precision: Precision, hard_rows: HardRows | None) -> dict[str, AnyPlacement]:
    """Every weight of the decoder and the tables; the hard rows are the token table's last ones."""
    shapes = tensor_shapes(config)
    rows, width = shapes.pop(TOKENS)
    tokens = {TOKENS: (rows + (hard_rows.count if hard_rows else 0), width)}
    per_layer = {PER_LAYER: shapes.pop(PER_LAYER)}
    tokens_storage = precision.of_table(precision.tokens, width)
    per_layer_storage = precision.of_table(precision.per_layer, per_layer[PER_LAYER][1])
    return {
        **lay_out(DECODER_DATA, shapes, lambda name: precision.of_weight(name, shapes[name])),
        **lay_out(TOKEN_TABLE, tokens, lambda _: tokens_storage),
        **lay_out(PER_LAYER_TABLE, per_layer, lambda _: per_layer_storage),
    }


def prefill_placements(config: TextConfig, precision: Precision, decoder: Placements) -> dict[str, AnyPlacement]:
    """The matrices that a prefill graph has for itself: those that the `decoder` quantizes and that KV caches depend
    on."""
    storage = precision.prefill
    if storage is None:
        return {}
    last = config.num_kv_layers - 1
    used = (
        *(f"layers.{i}." for i in range(last)),
        *(f"layers.{last}.self_attn.{name}_proj." for name in "qkv"),
        "altup_projections.",
        "per_layer_model_projection.",
    )
    own = {
        name: place.shape
        for name, place in decoder.items()
        if isinstance(place, QuantizedPlacement) and name.startswith(used)
    }
    return lay_out(PREFILL_DATA, own, lambda _: storage)


def table_of(placements: Placements, name: str) -> TablePlacement:
    """The place of a table, which is never quantized by rows."""
    place = placements[name]
    assert not isinstance(place, RowsPlacement)
    return place
