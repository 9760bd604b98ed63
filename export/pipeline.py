"""From a checkpoint to an artifact, step by step; see the diagram "Export" in README.md."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import onnx_ir as ir

from gemma3n_onnx.runtime import artifact
from gemma3n_onnx.runtime.artifact import FileInfo, Manifest

from .build_graphs import BuiltGraph, build_graphs, weights_of_encoders
from .checkpoint.checkpoint import ENCODER_MODULES, Checkpoint
from .encoders import hard_row_values
from .layouts.select import artifact_kind
from .manifest import graph_info, manifest_of
from .options import ExportOptions
from .plan import ExportPlan, plan_export
from .progress import ExportProgress
from .stored import StoredWeight, work_of
from .text_weights import PER_LAYER_TABLE, TOKENS, StoredWeights
from .weights import Blocks, WeightStream, attach, cut_blocks, raw_blocks
from .writer import file_info, staged, write_json


@dataclass(frozen=True)
class ExportSummary:
    """`manifest` describes what was written; only some layouts save it."""

    folder: Path
    manifest: Manifest
    seconds: float


def export(checkpoint: Checkpoint, output: Path, options: ExportOptions, progress: ExportProgress) -> ExportSummary:
    """Writes the artifact of one slice of `checkpoint` to `output`.

    Raises:
        SliceError, CheckpointError, ChatTemplateError, ExportError: each says what to change; nothing is left behind.
    """
    started = time.monotonic()
    plan = plan_export(checkpoint, options)
    with staged(output, force=options.force, needed_bytes=plan.needed_bytes, kind=artifact_kind()) as folder:
        graphs = build_graphs(plan, progress)
        graph_files = plan.layout.graph_files(plan.precision_name)
        graph_infos = {name: graph_info(graph_files.get(name, ""), graph.model) for name, graph in graphs.items()}
        (folder / plan.layout.folder).mkdir(exist_ok=True)
        progress.stage("Writing weights")
        encoder_weights = weights_of_encoders(graphs)
        weight_files = _write_weights(plan, checkpoint, encoder_weights, folder, progress)
        _copy_companions(checkpoint, plan.chat_template, folder)
        manifest = replace(manifest_of(plan, graph_infos, encoder_weights), files=weight_files)
        own_id = artifact.export_id_of(asdict(manifest), manifest.weight_files)
        _save_graphs(plan, graphs, own_id, folder)
        model_config = plan.slice.hf_config(checkpoint.config)
        for name, content in plan.layout.config_files(model_config, manifest, plan.slice.config).items():
            write_json(folder / name, content)
        files = {**_small_files(folder, weight_files), **weight_files}
        manifest = replace(manifest, files=files, export_id=own_id)
        if plan.layout.writes_manifest:
            artifact.save_manifest(folder, manifest)
    return ExportSummary(output, manifest, time.monotonic() - started)


def _write_weights(
    plan: ExportPlan, checkpoint: Checkpoint, encoder_weights: StoredWeights, folder: Path, progress: ExportProgress
) -> dict[str, FileInfo]:
    by_file: dict[str, dict[str, StoredWeight]] = {}
    placed = chain.from_iterable(each.items() for each in (plan.text_weights, plan.prefill_weights, encoder_weights))
    for name, stored in placed:
        by_file.setdefault(stored.file, {})[name] = stored

    def blocks(name: str) -> Blocks:
        if name == TOKENS and plan.hard_tokens is not None:
            text_rows = cut_blocks(checkpoint, plan.slice.source_of(name))
            return chain(text_rows, hard_row_values(checkpoint, plan.hard_tokens))
        if name.startswith(tuple(f"{module}." for modules in ENCODER_MODULES.values() for module in modules)):
            return raw_blocks(checkpoint, checkpoint.encoder_raw_name(name))
        return cut_blocks(checkpoint, plan.slice.source_of(name))

    progress.total(work_of(stored for weights in by_file.values() for stored in weights.values()))
    stream = WeightStream(folder / plan.layout.folder, progress.done)
    scales = {PER_LAYER_TABLE: plan.slice.config.hidden_size_per_layer_input**0.5}
    return {file: stream.write_file(file, weights, blocks, scales.get(file, 1.0)) for file, weights in by_file.items()}


def _save_graphs(plan: ExportPlan, graphs: Mapping[str, BuiltGraph], own_id: str, folder: Path) -> None:
    """Saves the graphs that the layout has, each with the id of the export."""
    for name, file in plan.layout.graph_files(plan.precision_name).items():
        if (graph := graphs.get(name)) is not None:
            attach(graph.model, graph.weights)
            graph.model.metadata_props[artifact.EXPORT_ID] = own_id
            ir.save(graph.model, folder / plan.layout.folder / file)


def _copy_companions(checkpoint: Checkpoint, chat_template: str | None, folder: Path) -> None:
    for path in checkpoint.tokenizer_files():
        shutil.copyfile(path, folder / path.name)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _small_files(folder: Path, weight_files: Mapping[str, FileInfo]) -> dict[str, FileInfo]:
    """Hashes every file except the weight files, which were hashed while writing."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in weight_files)
    return {path.name: file_info(path) for path in paths}
