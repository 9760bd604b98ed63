"""The weights of the decoder, the prefill graph and both tables: storage, file and offset of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gemma3n_onnx.graphs.config import TextConfig
from gemma3n_onnx.graphs.shapes import parameter_shapes

from .quantization.config import Storage
from .quantization.precision import Precision
from .stored import BlockQuantizedTensor, RowQuantizedTensor, StoredTable, StoredWeight, lay_out

if TYPE_CHECKING:
    from gemma3n_onnx.graphs.embedding import HardRows

TOKENS, PER_LAYER, HEAD = "embed_tokens.weight", "embed_tokens_per_layer.weight", "lm_head.weight"
DECODER_DATA, PREFILL_DATA = "decoder.onnx.data", "prefill.onnx.data"
TOKEN_TABLE, PER_LAYER_TABLE = "token_embeddings.bin", "per_layer_embeddings.bin"

StoredWeights = Mapping[str, StoredWeight]
"""By the tensor's name in the checkpoint."""


def tensor_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a text decoder, tables included; a tied head is the token table."""
    shapes = parameter_shapes(config)
    shapes[TOKENS] = shapes.pop(HEAD) if config.tied_head else shapes[HEAD]
    width = config.num_layers * config.hidden_size_per_layer_input
    shapes[PER_LAYER] = (config.vocab_size_per_layer_input, width)
    return shapes


def lay_out_text(config: TextConfig, precision: Precision, hard_rows: HardRows | None) -> dict[str, StoredWeight]:
    """The weights of the decoder and both tables; the hard rows are the last ones of the token table.

    A head of its own is stored as the token table is.
    """
    shapes = tensor_shapes(config)
    rows, width = shapes.pop(TOKENS)
    tokens = {TOKENS: (rows + (hard_rows.count if hard_rows else 0), width)}
    per_layer = {PER_LAYER: shapes.pop(PER_LAYER)}
    tokens_storage = precision.of_table(precision.tokens, width)
    per_layer_storage = precision.of_table(precision.per_layer, per_layer[PER_LAYER][1])

    def storage_of(name: str) -> Storage:
        return tokens_storage if name == HEAD else precision.of_weight(name, shapes[name])

    return {
        **lay_out(DECODER_DATA, shapes, storage_of),
        **lay_out(TOKEN_TABLE, tokens, lambda _: tokens_storage),
        **lay_out(PER_LAYER_TABLE, per_layer, lambda _: per_layer_storage),
    }


def lay_out_prefill(config: TextConfig, precision: Precision, decoder: StoredWeights) -> dict[str, StoredWeight]:
    """The prefill graph's own weights: the matrices that fill KV caches and are quantized in the `decoder`."""
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
        name: stored.shape
        for name, stored in decoder.items()
        if isinstance(stored, BlockQuantizedTensor) and name.startswith(used)
    }
    return lay_out(PREFILL_DATA, own, lambda _: storage)


def head_of(weights: StoredWeights, vocab_size: int) -> StoredTable:
    """The output head: a weight of its own, or the first rows of the token table."""
    return table_of(weights, HEAD) if HEAD in weights else table_of(weights, TOKENS).first_rows(vocab_size)


def table_of(weights: StoredWeights, name: str) -> StoredTable:
    """A table, which is never quantized by rows."""
    stored = weights[name]
    assert not isinstance(stored, RowQuantizedTensor)
    return stored
