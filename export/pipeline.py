"""From a checkpoint to an artifact, step by step; see the diagram "Export" in README.md."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Protocol, get_args

import onnx_ir as ir

from gemma3n_onnx.graphs.candidates import candidates
from gemma3n_onnx.graphs.config import TextConfig
from gemma3n_onnx.graphs.decoder import Logits
from gemma3n_onnx.graphs.embedding import HardRows
from gemma3n_onnx.graphs.passes.choose_likeliest import ChooseLikeliest
from gemma3n_onnx.graphs.passes.narrow_products import NarrowProducts
from gemma3n_onnx.graphs.passes.only_caches import OnlyCaches
from gemma3n_onnx.graphs.passes.quantize_dynamic import products
from gemma3n_onnx.runtime import artifact
from gemma3n_onnx.runtime.artifact import Manifest

from . import slicing, trace
from .checkpoint.checkpoint import ENCODER_MODULES, Checkpoint
from .checkpoint.processor import FrontEnds, read_front_ends
from .encoders import (
    FEATURES,
    Encoder,
    HardTokens,
    choose_modalities,
    find_encoders,
    find_hard_tokens,
    hard_row_values,
)
from .errors import ExportOptionError
from .layouts.base import Layout, Requested
from .layouts.select import DEFAULT, artifact_kind, layout_named
from .manifest import Exported, TokenIds, graph_info, manifest_of, token_ids
from .placements import PER_LAYER_TABLE, TOKENS, prefill_placements, table_of, tensor_shapes, text_placements
from .quantization.options import QuantizationOptions
from .quantization.precision import Precision
from .quantization.recipes import precision_for
from .weights import (
    IR_DTYPES,
    AnyPlacement,
    Blocks,
    WeightStream,
    attach,
    check_tensors,
    cut_blocks,
    lay_out,
    raw_blocks,
    weight_shapes,
)
from .writer import file_info, staged, write_json

HEAD = "lm_head.weight"
LOGITS: tuple[str, ...] = get_args(Logits)
MODALITIES = ("text", *ENCODER_MODULES)

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
    quantization: QuantizationOptions = field(default_factory=QuantizationOptions)
    """Parts of a quantized precision's recipe that are to be different."""
    target: str = "cpu"
    logits: Logits = "last"
    modalities: tuple[str, ...] | None = None
    """Those of the checkpoint, or of the layout, where None; text is always among them."""
    layout: str = DEFAULT
    force: bool = False


@dataclass(frozen=True)
class ExportSummary:
    """`manifest` describes what was written; it is saved only in layouts that have one."""

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
    layout = layout_named(options.layout)
    precision = layout.precision(precision_for(options.precision, options.target, options.quantization))
    chosen = choose_slice(checkpoint, options.slice, options.matformer_config)
    source = _read_source(checkpoint, chosen, options.modalities or layout.modalities)
    placements = text_placements(chosen.config, precision, source.hard_rows)

    of_prefill = prefill_placements(chosen.config, precision, placements) if options.logits == "last" else {}
    needed = _needed_bytes([placements, of_prefill], source, precision)

    with staged(output, force=options.force, needed_bytes=needed, kind=artifact_kind()) as folder:
        inner = folder / layout.folder
        inner.mkdir(exist_ok=True)
        traced = _Traced(chosen.config, source, precision, options.logits, layout)
        graphs = _trace_graphs(traced, placements, of_prefill, progress)
        graph_files = layout.graph_files(options.precision)
        infos = {}
        for name, graph in graphs.items():
            infos[name] = graph_info(graph_files.get(name, ""), graph.model)
            if name in graph_files:
                attach(graph.model, graph.weights)
                ir.save(graph.model, inner / graph_files[name])
        progress.stage("Writing weights")
        weights = [placements, of_prefill, _encoder_weights(graphs)]
        files = _write_weights(inner, checkpoint, chosen, source, weights, progress)
        _copy_companions(checkpoint, folder)
        manifest = manifest_of(
            Exported(
                checkpoint=checkpoint,
                slice_name=chosen.name,
                mmlu=chosen.mmlu,
                config=chosen.config,
                precision_name=options.precision,
                precision=precision,
                placements=placements,
                encoder_weights=_encoder_weights(graphs),
                target=options.target,
                logits=options.logits,
                tokens=source.tokens,
                hard_rows=source.hard_rows,
                front_ends=source.front_ends,
                encoders=source.encoders,
                graphs=infos,
            )
        )
        model_config = chosen.hf_config(checkpoint.config)
        for name, content in layout.config_files(model_config, manifest, chosen.config).items():
            write_json(folder / name, content)
        paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in files)
        manifest = manifest.with_files({**{path.name: file_info(path) for path in paths}, **files})
        if layout.writes_manifest:
            artifact.save_manifest(folder, manifest)
    return ExportSummary(output, manifest, time.monotonic() - started)


@dataclass(frozen=True)
class _Source:
    """What an export needs to know of a checkpoint, all of it checked."""

    tokens: TokenIds
    encoders: Mapping[str, Encoder]
    hard_tokens: HardTokens | None
    front_ends: FrontEnds

    @property
    def hard_rows(self) -> HardRows | None:
        return self.hard_tokens.rows if self.hard_tokens else None


def _read_source(checkpoint: Checkpoint, chosen: slicing.Slice, modalities: Collection[str] | None) -> _Source:
    wanted = choose_modalities(modalities, checkpoint)
    tokens = token_ids(checkpoint)
    checkpoint.check_tokenizer()
    check_tensors(checkpoint, chosen, tensor_shapes(chosen.source))
    checkpoint.check_all_known()
    return _Source(
        tokens=tokens,
        encoders=find_encoders(checkpoint, wanted),
        hard_tokens=find_hard_tokens(checkpoint),
        front_ends=read_front_ends(checkpoint, wanted),
    )


@dataclass(frozen=True)
class _Graph:
    """A traced graph and where each of its weights lies."""

    model: ir.Model
    weights: Mapping[str, AnyPlacement]


def check_options(options: ExportOptions) -> None:
    """What can be told without a checkpoint, which may have a slice table of its own.

    Raises:
        ExportOptionError: an unknown value, or a CSV without a slice.
        SliceError: the CSV breaks a rule, or the slice is not in it.
    """
    precision_for(options.precision, options.target, options.quantization)
    requested = Requested(options.precision, options.target, options.logits, options.modalities)
    layout_named(options.layout).check(requested)
    if options.logits not in LOGITS:
        raise ExportOptionError(f"Unknown logits {options.logits!r}; choose {' or '.join(LOGITS)}.")
    if unknown := sorted(set(options.modalities or ()) - set(MODALITIES)):
        raise ExportOptionError(f"Unknown modality {unknown[0]!r}; choose from {', '.join(MODALITIES)}.")
    if options.matformer_config is not None:
        if options.slice is None:
            raise ExportOptionError("--matformer-config needs --slice with the name of one of its slices.")
        slicing.find_slice(options.slice, slicing.load_slices(options.matformer_config))


def choose_slice(checkpoint: Checkpoint, name: str | None, table: Path | None) -> slicing.Slice:
    if name is None:
        return slicing.whole(checkpoint.text_config)
    spec = slicing.find_slice(name, slicing.load_slices(table, checkpoint.slice_table))
    return slicing.resolve(spec, checkpoint.text_config)


@dataclass(frozen=True)
class _Traced:
    """What the graphs of an export follow from."""

    config: TextConfig
    source: _Source
    precision: Precision
    logits: Logits
    layout: Layout


def _trace_graphs(
    of: _Traced,
    placements: Mapping[str, AnyPlacement],
    of_prefill: Mapping[str, AnyPlacement],
    progress: Progress,
) -> dict[str, _Graph]:
    config, precision, source = of.config, of.precision, of.source
    progress.stage("Tracing the decoder")
    windows = of.layout.windowed_caches and not precision.device
    decoder = trace.trace_decoder(config, of.logits, precision.compute, windows)
    chooses = precision.device and of.logits == "last"
    if chooses:
        ChooseLikeliest()(decoder)
    soft_ids = {FEATURES[m]: soft.token_id for m, soft in source.front_ends.soft_tokens.items()}
    rows_dtype = precision.storage if precision.tokens is None else "fp16"
    embedding = trace.trace_embedding(
        config, rows_dtype, precision.compute, source.hard_rows, soft_ids if of.layout.merges_soft_tokens else {}
    )
    of.layout.adapt(decoder, embedding, config)
    head = table_of(placements, TOKENS).first_rows(config.vocab_size)
    graphs = {"decoder": _Graph(decoder, {**placements, HEAD: head}), "embedding": _Graph(embedding, placements)}
    if chooses:
        graphs["candidates"] = _Graph(candidates(config.vocab_size, trace.OPSET), {})
    if of_prefill:
        prefill = trace.trace_decoder(config, of.logits, precision.compute, windows)
        OnlyCaches()(prefill)
        graphs["prefill"] = _Graph(prefill, {**placements, **of_prefill})
    for modality, encoder in source.encoders.items():
        progress.stage(f"Tracing the {modality} encoder")
        model = encoder.trace()
        storage_of = partial(precision.of_encoder, products=products(model))
        if (dtype := precision.encoder_products) != "fp32":
            NarrowProducts(IR_DTYPES[dtype])(model)
        graphs[modality] = _Graph(model, lay_out(encoder.data_file, weight_shapes(model), storage_of))
    return graphs


def _encoder_weights(graphs: Mapping[str, _Graph]) -> dict[str, AnyPlacement]:
    return {name: place for key in FEATURES if key in graphs for name, place in graphs[key].weights.items()}


def _needed_bytes(weights: Sequence[Mapping[str, AnyPlacement]], source: _Source, precision: Precision) -> int:
    encoders = (math.prod(shape) for encoder in source.encoders.values() for shape in encoder.shapes.values())
    text = sum(place.nbytes for placements in weights for place in placements.values())
    return text + sum(encoders) * artifact.BYTES_PER_VALUE[precision.storage] + _SMALL_FILES_BYTES


def _write_weights(
    folder: Path,
    checkpoint: Checkpoint,
    chosen: slicing.Slice,
    source: _Source,
    weights: Sequence[Mapping[str, AnyPlacement]],
    progress: Progress,
) -> dict[str, artifact.FileInfo]:
    by_file: dict[str, dict[str, AnyPlacement]] = {}
    for placements in weights:
        for name, place in placements.items():
            by_file.setdefault(place.file, {})[name] = place

    def blocks(name: str) -> Blocks:
        if name == TOKENS and source.hard_tokens is not None:
            text_rows = cut_blocks(checkpoint, chosen.source_of(name))
            return chain(text_rows, hard_row_values(checkpoint, source.hard_tokens))
        if name.startswith(tuple(f"{module}." for modules in ENCODER_MODULES.values() for module in modules)):
            return raw_blocks(checkpoint, checkpoint.encoder_raw_name(name))
        return cut_blocks(checkpoint, chosen.source_of(name))

    progress.bytes_total(sum(place.nbytes for of_file in by_file.values() for place in of_file.values()))
    stream = WeightStream(folder, progress.bytes_done)
    scales = {PER_LAYER_TABLE: chosen.config.hidden_size_per_layer_input**0.5}
    return {file: stream.write_file(file, of_file, blocks, scales.get(file, 1.0)) for file, of_file in by_file.items()}


def _copy_companions(checkpoint: Checkpoint, folder: Path) -> None:
    for path in checkpoint.tokenizer_files():
        shutil.copyfile(path, folder / path.name)
    if (template := checkpoint.chat_template()) is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
