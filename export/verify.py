"""Parity of an artifact with transformers, on the checkpoint that it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from gemma3n_onnx.graphs.config import TextConfig
from gemma3n_onnx.runtime.artifact import Manifest
from gemma3n_onnx.runtime.generation import check_context
from gemma3n_onnx.runtime.model import OnnxGemma3n

from .checkpoint import Checkpoint
from .errors import ExportError
from .layout import tensor_shapes
from .pipeline import choose_slice
from .reference import (
    StorageOf,
    decoder_logits,
    load_decoder,
    prefilled_logits,
    stored_for_prefill,
    stored_in,
    unchanged,
)
from .sizes import parameter_counts
from .weights import check_tensors

# Largest logit error as a share of the logit range, by the dtype that the artifact computes in, against
# transformers in fp32 on the weights as the artifact stores them.
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 8e-2}
QUANTIZED_TOLERANCE = 3e-2  # products of quantized weights take activations in int8


@dataclass(frozen=True)
class Errors:
    """Differences of two sets of logits; those of the reference span `logit_range`. KL is in nats."""

    max_error: float
    logit_range: float
    mean_kl: float
    max_kl: float
    greedy_agreement: float

    @property
    def relative_error(self) -> float:
        return self.max_error / self.logit_range


@dataclass(frozen=True)
class Parity:
    """`graph`: against the weights as stored, which is what the verdict is on. `prefill`: the same, with a prefill
    graph that has weights of its own reading the prompt; None where there is none. `original`: against the checkpoint's
    own weights, so with what the storage precision costs; None where storing loses nothing."""

    positions: int
    precision: str
    tolerance: float
    graph: Errors
    prefill: Errors | None
    original: Errors | None

    @property
    def passed(self) -> bool:
        return all(of is None or of.relative_error <= self.tolerance for of in (self.graph, self.prefill))


def verify(
    model: OnnxGemma3n,
    checkpoint: Checkpoint,
    slice_name: str | None,
    table: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
) -> Parity:
    """Compares logits with transformers (eager attention, fp32) at the positions that the artifact gives.

    Each prompt is continued greedily by the artifact; transformers then reads prompt and continuation in
    one pass without a cache, so the two share nothing but the token ids. An artifact with all logits is
    compared at every position instead.

    Raises:
        ExportError: the artifact is not of this checkpoint and slice.
        ContextLengthError: prompt and continuation exceed the context.
    """
    manifest = model.manifest
    for prompt in prompts:
        check_context(manifest.max_context, len(prompt), new_tokens)
    chosen = choose_slice(checkpoint, slice_name, table)
    _check_same_architecture(model, chosen.config)
    check_tensors(checkpoint, chosen, tensor_shapes(chosen.source))
    prefill_graph = model.engine.prefill_graph
    prefill_graph.release()
    prefill_graph.budget = 0
    continued = [_our_logits(model, list(prompt), new_tokens) for prompt in prompts]

    def load(storage_of: StorageOf) -> nn.Module:
        return load_decoder(checkpoint, chosen, storage_of)

    def compare(storage_of: StorageOf) -> Errors:
        decoder = load(storage_of)
        theirs = [decoder_logits(decoder, ids, len(logits)) for ids, logits in continued]
        return _errors([logits for _, logits in continued], theirs)

    def compare_prefill() -> Errors:
        prefill_graph.load()
        ours = [_our_logits(model, list(prompt), new_tokens) for prompt in prompts]
        storages = stored_for_prefill(manifest), stored_in(manifest)
        theirs = prefilled_logits(load, storages, [ids for ids, _ in ours], new_tokens)
        return _errors([logits for _, logits in ours], theirs)

    return Parity(
        positions=sum(len(logits) for _, logits in continued),
        precision=manifest.precision,
        tolerance=_tolerance(manifest),
        graph=compare(stored_in(manifest)),
        prefill=None if manifest.prefill is None else compare_prefill(),
        original=None if _keeps_all(checkpoint, manifest) else compare(unchanged),
    )


def _tolerance(manifest: Manifest) -> float:
    """Activations in int8 are those of quantized weights on the CPU, where the rest is fp32."""
    quantized = bool(manifest.quantization) and manifest.compute_dtype == "fp32"
    return QUANTIZED_TOLERANCE if quantized else TOLERANCE[manifest.compute_dtype]


def random_prompts(model: OnnxGemma3n, rng: np.random.Generator, count: int, length: int) -> list[list[int]]:
    """`count` prompts of `length` tokens: <bos>, then ids of the text vocabulary."""
    manifest = model.manifest
    rows = manifest.per_layer_embeddings.rows
    return [[manifest.bos_token_id, *rng.integers(4, rows, length - 1).tolist()] for _ in range(count)]


def describe(parity: Parity) -> str:
    lines = [f"{parity.positions} positions against transformers (eager, fp32)"]
    of_weights = "the weights" if parity.original is None else f"the weights as stored in {parity.precision}"
    of_prefill = f"{of_weights}, the prompt on those of its own graph"
    found = ((of_weights, parity.graph), (of_prefill, parity.prefill), ("the original weights", parity.original))
    for title, errors in found:
        if errors is not None:
            lines += [
                f"on {title}:",
                f"  max logit error   {errors.max_error:.3e}, {errors.relative_error:.3e} of the range "
                f"{errors.logit_range:.2f}",
                f"  KL mean / max     {errors.mean_kl:.3e} / {errors.max_kl:.3e} nats",
                f"  greedy agreement  {errors.greedy_agreement:.2%}",
            ]
    verdict = "PASS" if parity.passed else "FAIL"
    lines.append(f"{verdict} (tolerance on {of_weights}: {parity.tolerance:.0e} of the range)")
    return "\n".join(lines)


def _check_same_architecture(model: OnnxGemma3n, config: TextConfig) -> None:
    manifest = model.manifest
    widths = (manifest.token_embeddings.width, manifest.per_layer_embeddings.width, manifest.vocab_size)
    per_layer = config.num_layers * config.hidden_size_per_layer_input
    if widths != (config.hidden_size, per_layer, config.vocab_size):
        raise ExportError(
            f"The artifact, slice {manifest.slice!r} of {manifest.source}, has {manifest.num_layers} layers, "
            f"{widths[0]} channels and {widths[2]} tokens, and --model with --slice gives {config.num_layers}, "
            f"{config.hidden_size} and {config.vocab_size}; give the checkpoint and slice it was made of."
        )
    parameters = parameter_counts(config).text
    if parameters != manifest.parameters.text:
        raise ExportError(
            f"The artifact, slice {manifest.slice!r} of {manifest.source}, has {manifest.parameters.text:,} text "
            f"parameters, and --model with --slice gives {parameters:,}; give the checkpoint, the slice and the slice "
            "table it was made of."
        )


def _keeps_all(checkpoint: Checkpoint, manifest: Manifest) -> bool:
    """Whether every value of the checkpoint is stored as it is."""
    if manifest.quantization:
        return False
    storage = manifest.storage
    dtypes = {checkpoint.spec(name).dtype for name in checkpoint.text_names()}
    return storage == "fp32" or (storage == "bf16" and dtypes == {"BF16"}) or (storage == "fp16" and dtypes == {"F16"})


def _our_logits(model: OnnxGemma3n, prompt: list[int], new_tokens: int) -> tuple[list[int], np.ndarray]:
    """The token ids read, and the artifact's logits [positions, V] at the last of them."""
    if model.manifest.logits == "all":
        return prompt, model.engine.evaluate(prompt)
    cache = model.engine.new_cache(1, len(prompt) + new_tokens)
    steps = [model.engine.prefill(cache, 0, prompt)]
    decoder = model.engine.decoder(cache)
    ids = list(prompt)
    while len(steps) < new_tokens:
        ids.append(int(steps[-1].argmax()))
        steps.append(decoder.step(np.array(ids[-1:]), np.array([True]))[0].copy())
    return ids, np.stack(steps)


def _errors(of_ours: Sequence[np.ndarray], of_theirs: Sequence[np.ndarray]) -> Errors:
    ours, theirs = (np.concatenate(logits).astype(np.float64) for logits in (of_ours, of_theirs))
    kl = kl_divergence(theirs, ours)
    return Errors(
        max_error=float(np.abs(ours - theirs).max()),
        logit_range=float(theirs.max() - theirs.min()),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        greedy_agreement=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    )


def kl_divergence(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    """KL(p || q) in nats for each row of logits [n, V]."""
    p, q = (x - x.max(-1, keepdims=True) for x in (p_logits, q_logits))
    p -= np.log(np.exp(p).sum(-1, keepdims=True))
    q -= np.log(np.exp(q).sum(-1, keepdims=True))
    return (np.exp(p) * (p - q)).sum(-1)
