"""From a checkpoint to an artifact, step by step; see the diagram "Export" in README.md."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, get_args

import onnx_ir as ir

from gemma3n_onnx.graphs.config import TextConfig
from gemma3n_onnx.graphs.decoder import Logits, cache_specs
from gemma3n_onnx.graphs.passes.store_narrow import StoreNarrow
from gemma3n_onnx.runtime import artifact
from gemma3n_onnx.runtime.artifact import Manifest

from . import slicing, trace
from .checkpoint import Checkpoint
from .errors import CheckpointError, ExportOptionError
from .precision import Precision, precision_for
from .sizes import parameter_counts
from .weights import IR_DTYPES, Placement, WeightStream, attach, check_tensors, lay_out
from .writer import file_info, staged, write_json

PRODUCER = f"gemma3n-onnx {version('gemma3n-onnx')}"

DECODER, DECODER_DATA, EMBEDDING = "decoder.onnx", "decoder.onnx.data", "embedding.onnx"
TOKEN_TABLE, PER_LAYER_TABLE = "token_embeddings.bin", "per_layer_embeddings.bin"
LOGITS: tuple[str, ...] = get_args(Logits)

_SMALL_FILES_BYTES = 64 << 20  # graphs, tokenizer, configs: an upper bound for the disk-space check


class Progress(Protocol):
    def stage(self, title: str) -> None: ...
    def bytes_total(self, total: int) -> None: ...
    def bytes_done(self, count: int) -> None: ...


@dataclass(frozen=True)
class ExportOptions:
    slice: str | None = None
    matformer_config: Path | None = None
    precision: str = "fp32"
    target: str = "cpu"
    logits: Logits = "last"
    force: bool = False


@dataclass(frozen=True)
class ExportSummary:
    folder: Path
    manifest: Manifest
    seconds: float


def export(checkpoint: Checkpoint, output: Path, options: ExportOptions, progress: Progress) -> ExportSummary:
    """Writes the artifact of one slice of `checkpoint` to `output`.

    Raises:
        SliceError, CheckpointError, ExportError: each says what to change; nothing is left behind.
    """
    started = time.monotonic()
    check_options(options)
    precision = precision_for(options.precision, options.target)
    chosen = choose_slice(checkpoint.text_config, options.slice, options.matformer_config)
    config = chosen.config
    tokens = _token_ids(checkpoint)
    checkpoint.check_tokenizer()
    check_tensors(checkpoint, chosen, tensor_shapes(chosen.source))
    placements = _placements(config, precision)
    data_bytes = sum({(p.file, p.offset): p.nbytes for p in placements.values()}.values())

    with staged(output, force=options.force, needed_bytes=data_bytes + _SMALL_FILES_BYTES) as folder:
        progress.stage("Tracing the decoder")
        decoder = trace.trace_decoder(config, options.logits, precision.compute)
        if precision.storage != precision.compute:
            StoreNarrow(set(trace.parameter_shapes(config)), IR_DTYPES[precision.storage])(decoder)
        embedding = trace.trace_embedding(config, precision.storage, precision.compute)
        for model, file in ((decoder, DECODER), (embedding, EMBEDDING)):
            attach(model, placements)
            ir.save(model, folder / file)

        progress.stage("Writing weights")
        progress.bytes_total(data_bytes)
        files = _write_weights(folder, checkpoint, chosen, placements, progress)
        _copy_companions(checkpoint, folder, chosen.hf_config(checkpoint.config))
        manifest = _manifest(checkpoint, chosen.name, config, precision, options, tokens, decoder, embedding)
        small = {p.name: file_info(p) for p in sorted(folder.iterdir()) if p.name not in files}
        manifest = manifest.with_files({**small, **files})
        artifact.save_manifest(folder, manifest)
    return ExportSummary(output, manifest, time.monotonic() - started)


def check_options(options: ExportOptions) -> None:
    """What can be told without a checkpoint. Raises ExportOptionError, SliceError."""
    precision_for(options.precision, options.target)
    if options.logits not in LOGITS:
        raise ExportOptionError(f"Unknown logits {options.logits!r}; choose {' or '.join(LOGITS)}.")
    if options.slice is not None:
        slicing.find_slice(options.slice, slicing.load_slices(options.matformer_config))
    elif options.matformer_config is not None:
        raise ExportOptionError("--matformer-config needs --slice with the name of one of its slices.")


def choose_slice(config: TextConfig, name: str | None, table: Path | None) -> slicing.Slice:
    if name is None:
        return slicing.whole(config)
    return slicing.resolve(slicing.find_slice(name, slicing.load_slices(table)), config)


def tensor_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a text decoder, tables included; the tied head is no tensor of its own."""
    shapes = trace.parameter_shapes(config)
    shapes["embed_tokens.weight"] = shapes.pop("lm_head.weight")
    width = config.num_layers * config.hidden_size_per_layer_input
    shapes["embed_tokens_per_layer.weight"] = (config.vocab_size_per_layer_input, width)
    return shapes


def _placements(config: TextConfig, precision: Precision) -> dict[str, Placement]:
    """Every parameter of both graphs; `lm_head` is the token table."""
    shapes = tensor_shapes(config)
    tables = {"embed_tokens.weight": TOKEN_TABLE, "embed_tokens_per_layer.weight": PER_LAYER_TABLE}
    placements: dict[str, Placement] = {}
    for name, file in tables.items():
        placements |= lay_out(file, {name: shapes.pop(name)}, precision.storage)
    placements |= lay_out(DECODER_DATA, shapes, precision.storage)
    placements["lm_head.weight"] = placements["embed_tokens.weight"]
    return placements


def _write_weights(
    folder: Path,
    checkpoint: Checkpoint,
    chosen: slicing.Slice,
    placements: Mapping[str, Placement],
    progress: Progress,
) -> dict[str, artifact.FileInfo]:
    stream = WeightStream(checkpoint, chosen, progress.bytes_done)
    scales = {PER_LAYER_TABLE: chosen.config.hidden_size_per_layer_input**0.5}
    files = {}
    for file in (DECODER_DATA, TOKEN_TABLE, PER_LAYER_TABLE):
        of_file = {n: p for n, p in placements.items() if p.file == file and n != "lm_head.weight"}
        files[file] = stream.write_file(folder / file, of_file, scales.get(file, 1.0))
    return files


def _copy_companions(checkpoint: Checkpoint, folder: Path, config: dict[str, Any]) -> None:
    for path in checkpoint.tokenizer_files():
        shutil.copyfile(path, folder / path.name)
    if (template := checkpoint.chat_template()) is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_json(folder / "config.json", config)


@dataclass(frozen=True)
class _TokenIds:
    bos: int
    pad: int
    eos: tuple[int, ...]


def _token_ids(checkpoint: Checkpoint) -> _TokenIds:
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
    return _TokenIds(
        bos=values["bos_token_id"],
        pad=values["pad_token_id"],
        eos=tuple(eos) if isinstance(eos, list) else (eos,),
    )


def _manifest(
    checkpoint: Checkpoint,
    slice_name: str,
    config: TextConfig,
    precision: Precision,
    options: ExportOptions,
    tokens: _TokenIds,
    decoder: ir.Model,
    embedding: ir.Model,
) -> Manifest:
    counts = parameter_counts(config)
    return Manifest(
        format=artifact.FORMAT,
        format_version=artifact.FORMAT_VERSION,
        producer=PRODUCER,
        source=checkpoint.name,
        slice=slice_name,
        precision=precision.name,
        compute_dtype=precision.compute,
        target=options.target,
        logits=options.logits,
        modalities=("text",),
        parameters=artifact.ParameterCounts(
            text=counts.text,
            effective=counts.effective,
            per_layer_embeddings=counts.ple_table,
            token_embeddings=counts.token_embedding,
        ),
        num_layers=config.num_layers,
        vocab_size=config.vocab_size,
        max_context=config.max_position_embeddings,
        bos_token_id=tokens.bos,
        pad_token_id=tokens.pad,
        eos_token_ids=tokens.eos,
        decoder=_graph_info(DECODER, decoder),
        embedding=_graph_info(EMBEDDING, embedding),
        caches=_cache_infos(config, options.logits, precision),
        token_embeddings=artifact.TableInfo(
            TOKEN_TABLE, precision.storage, config.vocab_size, config.hidden_size, config.hidden_size**0.5
        ),
        per_layer_embeddings=artifact.TableInfo(
            PER_LAYER_TABLE,
            precision.storage,
            config.vocab_size_per_layer_input,
            config.num_layers * config.hidden_size_per_layer_input,
            1.0,
        ),
        files={},
    )


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
        )
        for spec in cache_specs(config, logits)
    )


_DTYPE_NAMES = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.INT64: "int64",
}


def _graph_info(file: str, model: ir.Model) -> artifact.GraphInfo:
    def describe(value: ir.Value) -> artifact.TensorInfo:
        assert value.name is not None and value.dtype is not None and value.shape is not None
        shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
        return artifact.TensorInfo(value.name, _DTYPE_NAMES[value.dtype], shape)

    graph = model.graph
    return artifact.GraphInfo(file, tuple(map(describe, graph.inputs)), tuple(map(describe, graph.outputs)))
