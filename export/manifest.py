"""Builds the manifest of an artifact."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import version

import numpy as np
import onnx_ir as ir

from gemma3n_onnx.graphs.config import SLIDING
from gemma3n_onnx.graphs.decoder import cache_specs
from gemma3n_onnx.graphs.embedding import HardRows
from gemma3n_onnx.runtime import artifact
from gemma3n_onnx.runtime.artifact import Manifest

from .checkpoint import processor
from .checkpoint.sizes import parameter_counts
from .encoders import CheckpointEncoder
from .plan import ExportPlan
from .quantization.config import PerRow
from .stored import BlockQuantizedTensor, RowQuantizedTensor, StoredTable, StoredWeight
from .text_weights import HEAD, PER_LAYER, TOKENS, StoredWeights, head_of, table_of

PRODUCER = f"gemma3n-onnx {version('gemma3n-onnx')}"


def manifest_of(plan: ExportPlan, graphs: Mapping[str, artifact.GraphInfo], encoder_weights: StoredWeights) -> Manifest:
    """The manifest without its `files` and its `export_id`. `graphs` has every graph of the export, by its name in
    the layout."""
    config, precision = plan.slice.config, plan.precision
    counts = parameter_counts(config)
    hard_rows = plan.hard_rows or HardRows(config.vocab_size, 0)
    return Manifest(
        format=artifact.FORMAT,
        format_version=artifact.FORMAT_VERSION,
        producer=PRODUCER,
        source=plan.source,
        slice=plan.slice.name,
        precision=plan.precision_name,
        storage=precision.storage,
        compute_dtype=precision.compute,
        quantization={
            name: info
            for name, stored in {**plan.text_weights, **encoder_weights}.items()
            if (info := _quantization_info(stored)) is not None
        },
        target=plan.target,
        logits=plan.logits,
        modalities=plan.modalities,
        parameters=artifact.ParameterCounts(
            text=counts.text,
            effective=counts.effective,
            per_layer_embeddings=counts.ple_table,
            token_embeddings=counts.token_embedding,
            vision=_parameters(plan.encoders.get("vision")),
            audio=_parameters(plan.encoders.get("audio")),
        ),
        num_layers=config.num_layers,
        vocab_size=config.vocab_size,
        max_context=config.max_position_embeddings,
        bos_token_id=plan.tokens.bos,
        pad_token_id=plan.tokens.pad,
        eos_token_ids=plan.tokens.eos,
        decoder=graphs["decoder"],
        embedding=graphs["embedding"],
        prefill=graphs.get("prefill"),
        candidates=graphs.get("candidates"),
        scorer=graphs.get("scorer"),
        caches=_cache_infos(plan),
        step_bytes=_step_bytes(plan),
        mmlu=plan.slice.mmlu,
        token_embeddings=_table_info(table_of(plan.text_weights, TOKENS), config.hidden_size**0.5),
        per_layer_embeddings=_table_info(table_of(plan.text_weights, PER_LAYER), 1.0),
        first_hard_token_id=hard_rows.first_id,
        vision=_vision_info(plan, graphs),
        audio=_audio_info(plan, graphs),
        files={},
    )


def _quantization_info(stored: StoredWeight) -> artifact.QuantizationInfo | None:
    match stored:
        case BlockQuantizedTensor(config=config):
            return artifact.QuantizationInfo(config.bits, config.block, config.method)
        case RowQuantizedTensor():
            return artifact.QuantizationInfo(PerRow.bits, None, PerRow.method)
        case _:
            return None


def _step_bytes(plan: ExportPlan) -> int:
    """Bytes of weights that a decode step reads: the decoder's own and the head."""
    head = head_of(plan.text_weights, plan.slice.config.vocab_size)
    own = (stored for name, stored in plan.text_weights.items() if name not in (TOKENS, PER_LAYER, HEAD))
    return sum(_in_memory(stored, plan.precision.compute) for stored in (head, *own))


def _in_memory(stored: StoredWeight, compute: str) -> int:
    """Bytes of a tensor in memory, where narrower dtypes, also of scales, are widened at load."""
    wide = artifact.BYTES_PER_VALUE[compute]
    if not isinstance(stored, BlockQuantizedTensor):
        return math.prod(stored.shape) * wide
    zeros = 0 if stored.zeros is None else stored.zeros.nbytes
    return stored.codes.nbytes + math.prod(stored.scales.shape) * wide + zeros


def _table_info(stored: StoredTable, scale: float) -> artifact.TableInfo:
    if isinstance(stored, BlockQuantizedTensor):
        dtype, block, scales_offset = f"int{stored.config.bits}", stored.config.block, stored.scales.offset
    else:
        dtype, block, scales_offset = stored.dtype, None, None
    rows, width = stored.shape
    return artifact.TableInfo(stored.file, dtype, rows, width, scale, block, scales_offset)


def _vision_info(plan: ExportPlan, graphs: Mapping[str, artifact.GraphInfo]) -> artifact.VisionInfo | None:
    image = plan.front_ends.image
    if image is None:
        return None
    return artifact.VisionInfo(
        graph=graphs["vision"],
        soft_tokens=plan.front_ends.soft_tokens["vision"],
        image_sizes=processor.IMAGE_SIZES,
        default_image_size=image.size,
        rescale=image.rescale,
        compute_dtype=plan.precision.encoder_products,
    )


def _audio_info(plan: ExportPlan, graphs: Mapping[str, artifact.GraphInfo]) -> artifact.AudioInfo | None:
    log_mel = plan.front_ends.log_mel
    if log_mel is None:
        return None
    return artifact.AudioInfo(
        graph=graphs["audio"],
        soft_tokens=plan.front_ends.soft_tokens["audio"],
        log_mel=log_mel,
        compute_dtype=plan.precision.encoder_products,
    )


def _parameters(encoder: CheckpointEncoder | None) -> int:
    return 0 if encoder is None else sum(int(np.prod(shape)) for shape in encoder.shapes.values())


def _cache_infos(plan: ExportPlan) -> tuple[artifact.CacheInfo, ...]:
    config = plan.slice.config
    return tuple(
        artifact.CacheInfo(
            layer=spec.layer,
            past_key=spec.past[0],
            past_value=spec.past[1],
            present_key=spec.present[0],
            present_value=spec.present[1],
            dtype=plan.precision.compute,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            window=config.sliding_window if spec.windowed else None,
            attention_window=config.sliding_window if config.layer_types[spec.layer] == SLIDING else None,
        )
        for spec in cache_specs(config, plan.logits, plan.windowed_caches)
    )


_DTYPE_NAMES = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.INT64: "int64",
    ir.DataType.BOOL: "bool",
}


def graph_info(file: str, model: ir.Model) -> artifact.GraphInfo:
    def describe(value: ir.Value) -> artifact.TensorInfo:
        assert value.name is not None and value.dtype is not None and value.shape is not None
        shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
        return artifact.TensorInfo(value.name, _DTYPE_NAMES[value.dtype], shape)

    graph = model.graph
    return artifact.GraphInfo(file, tuple(map(describe, graph.inputs)), tuple(map(describe, graph.outputs)))
