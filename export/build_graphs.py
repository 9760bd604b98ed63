"""Traces the graphs of an export, rewrites them for target and layout, and lays out the encoders' weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir

from gemma3n_onnx.graphs.candidates import candidates
from gemma3n_onnx.graphs.passes.cache_only_decoder import CacheOnlyDecoder
from gemma3n_onnx.graphs.passes.choose_likeliest import ChooseLikeliest
from gemma3n_onnx.graphs.passes.narrow_products import NarrowProducts
from gemma3n_onnx.graphs.passes.quantize_dynamic import products
from gemma3n_onnx.graphs.passes.score_targets import ScoreTargets

from . import trace
from .encoders import FEATURES, CheckpointEncoder
from .plan import ExportPlan
from .progress import ExportProgress
from .quantization.precision import Precision
from .stored import lay_out
from .text_weights import HEAD, StoredWeights, head_of
from .weights import IR_DTYPES, weight_shapes


@dataclass(frozen=True)
class BuiltGraph:
    """A graph whose initializers have no data yet, and the stored weights for them."""

    model: ir.Model
    weights: StoredWeights


def build_graphs(plan: ExportPlan, progress: ExportProgress) -> dict[str, BuiltGraph]:
    """Every graph of the export, by the names of `Layout.graph_files`, even those that the layout does not write."""
    progress.stage("Tracing the decoder")
    graphs = _text_graphs(plan)
    for modality, encoder in plan.encoders.items():
        progress.stage(f"Tracing the {modality} encoder")
        graphs[modality] = _encoder_graph(encoder, plan.precision)
    return graphs


def weights_of_encoders(graphs: Mapping[str, BuiltGraph]) -> StoredWeights:
    return {name: stored for key in FEATURES if key in graphs for name, stored in graphs[key].weights.items()}


def _text_graphs(plan: ExportPlan) -> dict[str, BuiltGraph]:
    config, precision, layout = plan.slice.config, plan.precision, plan.layout
    decoder = trace.trace_decoder(config, plan.logits, precision.compute, plan.windowed_caches)
    if plan.argmax_in_decoder:
        ChooseLikeliest()(decoder)
    embedding = _trace_embedding(plan)
    layout.adapt(decoder, embedding, config)

    head = head_of(plan.text_weights, config.vocab_size)
    graphs = {
        "decoder": BuiltGraph(decoder, {**plan.text_weights, HEAD: head}),
        "embedding": BuiltGraph(embedding, plan.text_weights),
    }
    if plan.argmax_in_decoder:
        graphs["candidates"] = BuiltGraph(candidates(config.vocab_size, trace.OPSET), {})
    if plan.scores:
        scorer = trace.trace_decoder(config, "last", precision.compute, plan.windowed_caches)
        ScoreTargets()(scorer)
        graphs["scorer"] = BuiltGraph(scorer, graphs["decoder"].weights)
    if plan.prefill_weights:
        prefill = trace.trace_decoder(config, plan.logits, precision.compute, plan.windowed_caches)
        CacheOnlyDecoder()(prefill)
        graphs["prefill"] = BuiltGraph(prefill, {**plan.text_weights, **plan.prefill_weights})
    return graphs


def _trace_embedding(plan: ExportPlan) -> ir.Model:
    precision = plan.precision
    soft_ids = {}
    if plan.layout.merges_soft_tokens:
        soft_ids = {FEATURES[m]: soft.token_id for m, soft in plan.front_ends.soft_tokens.items()}
    rows_dtype = precision.storage if precision.tokens is None else "fp16"
    return trace.trace_embedding(plan.slice.config, rows_dtype, precision.compute, plan.hard_rows, soft_ids)


def _encoder_graph(encoder: CheckpointEncoder, precision: Precision) -> BuiltGraph:
    model = encoder.trace()
    storage_of = partial(precision.of_encoder, products=products(model))
    if (dtype := precision.encoder_products) != "fp32":
        NarrowProducts(IR_DTYPES[dtype])(model)
    return BuiltGraph(model, lay_out(encoder.data_file, weight_shapes(model), storage_of))
