"""What the manifest says of an export: the runtime recomputes none of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import onnx_ir as ir

from gemma3n_onnx.graphs.config import SLIDING, TextConfig
from gemma3n_onnx.graphs.decoder import Logits, cache_specs
from gemma3n_onnx.graphs.embedding import HardRows
from gemma3n_onnx.runtime import artifact

from .checkpoint import processor
from .checkpoint.checkpoint import Checkpoint
from .checkpoint.sizes import parameter_counts
from .encoders import Encoder
from .errors import CheckpointError
from .placements import PER_LAYER, TOKENS, table_of
from .quantization.precision import Precision
from .quantization.scheme import PerRow
from .weights import AnyPlacement, QuantizedPlacement, RowsPlacement, TablePlacement

PRODUCER = f"gemma3n-onnx {version('gemma3n-onnx')}"


@dataclass(frozen=True)
class TokenIds:
    bos: int
    pad: int
    eos: tuple[int, ...]


def token_ids(checkpoint: Checkpoint) -> TokenIds:
    """Generation's own ids where `generation_config.json` has them, else those of the config."""
    text = checkpoint.config.get("text_config", checkpoint.config)
    values = {key: text.get(key) for key in ("bos_token_id", "pad_token_id", "eos_token_id")}
    values |= {k: v for k, v in checkpoint.generation_config().items() if k in values and v is not None}
    vocab = checkpoint.text_config.vocab_size
    for key, value in values.items():
        if value is None:
            raise CheckpointError(f"Neither generation_config.json nor config.json gives {key}; add it.")
        for token_id in value if key == "eos_token_id" and isinstance(value, list) else [value]:
            if type(token_id) is not int or not 0 <= token_id < vocab:
                raise CheckpointError(
                    f"The {key} of the checkpoint's configs is {value!r}, which is not a token id from 0 to "
                    f"{vocab - 1}; download generation_config.json again."
                )
    eos = values["eos_token_id"]
    return TokenIds(
        bos=values["bos_token_id"],
        pad=values["pad_token_id"],
        eos=tuple(eos) if isinstance(eos, list) else (eos,),
    )


@dataclass(frozen=True)
class Exported:
    """The parts of an export. `placements` are the decoder's and the tables'; `encoders` those that it includes;
    `graphs` has theirs, "decoder", "embedding" and perhaps "prefill" and "candidates"."""

    checkpoint: Checkpoint
    slice_name: str
    mmlu: float | None
    config: TextConfig
    precision_name: str
    precision: Precision
    placements: Mapping[str, AnyPlacement]
    encoder_weights: Mapping[str, AnyPlacement]
    target: str
    logits: Logits
    tokens: TokenIds
    hard_rows: HardRows | None
    front_ends: processor.FrontEnds
    encoders: Mapping[str, Encoder]
    graphs: Mapping[str, artifact.GraphInfo]


def manifest_of(parts: Exported) -> artifact.Manifest:
    """The manifest, its `files` left to fill in."""
    config, precision = parts.config, parts.precision
    counts = parameter_counts(config)
    hard_rows = parts.hard_rows or HardRows(config.vocab_size, 0)
    return artifact.Manifest(
        format=artifact.FORMAT,
        format_version=artifact.FORMAT_VERSION,
        producer=PRODUCER,
        source=parts.checkpoint.name,
        slice=parts.slice_name,
        precision=parts.precision_name,
        storage=precision.storage,
        compute_dtype=precision.compute,
        quantization={
            name: info
            for name, place in {**parts.placements, **parts.encoder_weights}.items()
            if (info := _block_info(place)) is not None
        },
        target=parts.target,
        logits=parts.logits,
        modalities=("text", *parts.encoders),
        parameters=artifact.ParameterCounts(
            text=counts.text,
            effective=counts.effective,
            per_layer_embeddings=counts.ple_table,
            token_embeddings=counts.token_embedding,
            vision=_parameters(parts.encoders.get("vision")),
            audio=_parameters(parts.encoders.get("audio")),
        ),
        num_layers=config.num_layers,
        vocab_size=config.vocab_size,
        max_context=config.max_position_embeddings,
        bos_token_id=parts.tokens.bos,
        pad_token_id=parts.tokens.pad,
        eos_token_ids=parts.tokens.eos,
        decoder=parts.graphs["decoder"],
        embedding=parts.graphs["embedding"],
        prefill=parts.graphs.get("prefill"),
        candidates=parts.graphs.get("candidates"),
        caches=_cache_infos(config, parts.logits, precision),
        step_bytes=_step_bytes(parts),
        mmlu=parts.mmlu,
        token_embeddings=_table_info(table_of(parts.placements, TOKENS), config.hidden_size**0.5),
        per_layer_embeddings=_table_info(table_of(parts.placements, PER_LAYER), 1.0),
        first_hard_token_id=hard_rows.first_id,
        vision=_vision_info(parts),
        audio=_audio_info(parts),
        files={},
    )


def _block_info(place: AnyPlacement) -> artifact.BlockInfo | None:
    match place:
        case QuantizedPlacement(scheme=scheme):
            return artifact.BlockInfo(scheme.bits, scheme.block, scheme.method)
        case RowsPlacement():
            return artifact.BlockInfo(PerRow.bits, None, PerRow.method)
        case _:
            return None


def _step_bytes(parts: Exported) -> int:
    """What is read of all that the decoder holds: the head, which is the token table's first rows, and its own."""
    head = table_of(parts.placements, TOKENS).first_rows(parts.config.vocab_size)
    own = (place for name, place in parts.placements.items() if name not in (TOKENS, PER_LAYER))
    return sum(_in_memory(place, parts.precision.compute) for place in (head, *own))


def _in_memory(place: AnyPlacement, compute: str) -> int:
    """Bytes of a tensor once it is loaded: what is stored narrow is widened, scales too."""
    wide = artifact.BYTES_PER_VALUE[compute]
    if not isinstance(place, QuantizedPlacement):
        return math.prod(place.shape) * wide
    zeros = 0 if place.zeros is None else place.zeros.nbytes
    return place.codes.nbytes + math.prod(place.scales.shape) * wide + zeros


def _table_info(place: TablePlacement, scale: float) -> artifact.TableInfo:
    if isinstance(place, QuantizedPlacement):
        dtype, block, scales_offset = f"int{place.scheme.bits}", place.scheme.block, place.scales.offset
    else:
        dtype, block, scales_offset = place.dtype, None, None
    rows, width = place.shape
    return artifact.TableInfo(place.file, dtype, rows, width, scale, block, scales_offset)


def _vision_info(parts: Exported) -> artifact.VisionInfo | None:
    image = parts.front_ends.image
    if image is None:
        return None
    return artifact.VisionInfo(
        graph=parts.graphs["vision"],
        soft_tokens=parts.front_ends.soft_tokens["vision"],
        image_sizes=processor.IMAGE_SIZES,
        default_image_size=image.size,
        rescale=image.rescale,
        compute_dtype=parts.precision.encoder_products,
    )


def _audio_info(parts: Exported) -> artifact.AudioInfo | None:
    log_mel = parts.front_ends.log_mel
    if log_mel is None:
        return None
    return artifact.AudioInfo(
        graph=parts.graphs["audio"],
        soft_tokens=parts.front_ends.soft_tokens["audio"],
        log_mel=log_mel,
        compute_dtype=parts.precision.encoder_products,
    )


def _parameters(encoder: Encoder | None) -> int:
    return 0 if encoder is None else sum(int(np.prod(shape)) for shape in encoder.shapes.values())


def _cache_infos(config: TextConfig, logits: Logits, precision: Precision) -> tuple[artifact.CacheInfo, ...]:
    return tuple(
        artifact.CacheInfo(
            layer=spec.layer,
            past_key=spec.past[0],
            past_value=spec.past[1],
            present_key=spec.present[0],
            present_value=spec.present[1],
            dtype=precision.compute,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            window=config.sliding_window if spec.windowed else None,
            attention_window=config.sliding_window if config.layer_types[spec.layer] == SLIDING else None,
        )
        for spec in cache_specs(config, logits, not precision.device)
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
