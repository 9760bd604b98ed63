"""Parity of an artifact with transformers, on the checkpoint that it was made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.export.checkpoint.sizes import parameter_counts
from gemma3n_onnx.export.errors import ExportError
from gemma3n_onnx.export.plan import choose_slice
from gemma3n_onnx.export.text_weights import tensor_shapes
from gemma3n_onnx.export.weights import check_tensors
from gemma3n_onnx.graphs.config import TextConfig
from gemma3n_onnx.runtime.artifact import Manifest
from gemma3n_onnx.runtime.engine.engine import Engine
from gemma3n_onnx.runtime.generation.scheduler import check_context
from gemma3n_onnx.runtime.model import OnnxGemma3n

from .exact import exact_provider, takes_int8
from .reference import (
    StorageOf,
    decoder_logits,
    load_decoder,
    prefilled_logits,
    rounding_inputs,
    stored_for_prefill,
    stored_in,
    unchanged,
)

# Largest logit error as a share of the logit range, by the dtype that the artifact computes in, against
# transformers in fp32 on the weights as the artifact stores them.
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 8e-2}
# Activations that are rounded to int8 differ from those that are not by as much in any two implementations, but not
# by the same: so many times what rounding them costs transformers.
AS_MUCH = 2.0


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
class Rounded:
    """Where products take their activations in int8. `exact`: of the artifact's graphs with activations as they are.
    `cost`: of transformers whose products round them alike, from transformers whose products do not."""

    exact: Errors
    cost: Errors


@dataclass(frozen=True)
class Compared:
    """`errors` of the artifact as it runs, on the weights as stored."""

    errors: Errors
    rounded: Rounded | None

    def passed(self, tolerance: float) -> bool:
        if self.rounded is None:
            return self.errors.relative_error <= tolerance
        as_much = AS_MUCH * self.rounded.cost.relative_error
        return self.rounded.exact.relative_error <= tolerance and self.errors.relative_error <= as_much


@dataclass(frozen=True)
class Parity:
    """`graph`: against the weights as stored, which is what the verdict is on. `prefill`: the same, with a prefill
    graph that has weights of its own reading the prompt; None where there is none. `original`: against the checkpoint's
    own weights, so with what the storage precision costs; None where storing loses nothing."""

    positions: int
    precision: str
    tolerance: float
    graph: Compared
    prefill: Compared | None
    original: Errors | None

    @property
    def passed(self) -> bool:
        return all(each is None or each.passed(self.tolerance) for each in (self.graph, self.prefill))


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

    Products with activations in int8 are compared twice: as they run, to what rounding costs transformers, and in the
    same graphs with activations as they are, to the tolerance.

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
    continued = [_continue(model.engine, list(prompt), new_tokens) for prompt in prompts]
    texts = [ids for ids, _ in continued]
    last = len(continued[0][1]) if manifest.logits == "last" else None
    ours = _Logits(graph=np.concatenate([logits for _, logits in continued]))
    if manifest.prefill is not None:
        prefill_graph.load()
        ours.prefill = _read_all(model.engine, texts, last)
        prefill_graph.release()
    exact = _exact_logits(model, texts, last) if takes_int8(manifest) else None

    def load(storage_of: StorageOf) -> nn.Module:
        return load_decoder(checkpoint, chosen, storage_of)

    def read(decoder: nn.Module) -> np.ndarray:
        return np.concatenate([decoder_logits(decoder, ids, last or len(ids)) for ids in texts])

    def compare(ours: np.ndarray, exact: np.ndarray | None, reference: Callable[[bool], np.ndarray]) -> Compared:
        theirs = reference(False)
        rounded = None if exact is None else Rounded(_errors(exact, theirs), _errors(reference(True), theirs))
        return Compared(_errors(ours, theirs), rounded)

    def compare_graph() -> Compared:
        decoder = load(stored_in(manifest))

        def reference(int8: bool) -> np.ndarray:
            with rounding_inputs(decoder, stored_in(manifest)) if int8 else nullcontext():
                return read(decoder)

        return compare(ours.graph, None if exact is None else exact.graph, reference)

    def compare_prefill() -> Compared:
        storages = stored_for_prefill(manifest), stored_in(manifest)
        assert ours.prefill is not None and last is not None
        return compare(
            ours.prefill,
            None if exact is None else exact.prefill,
            lambda int8: np.concatenate(prefilled_logits(load, storages, texts, last, int8)),
        )

    return Parity(
        positions=len(ours.graph),
        precision=manifest.precision,
        tolerance=TOLERANCE[manifest.compute_dtype],
        graph=compare_graph(),
        prefill=None if ours.prefill is None else compare_prefill(),
        original=None if _keeps_all(checkpoint, manifest) else _errors(ours.graph, read(load(unchanged))),
    )


def random_prompts(model: OnnxGemma3n, rng: np.random.Generator, count: int, length: int) -> list[list[int]]:
    """`count` prompts of `length` tokens: <bos>, then ids of the text vocabulary."""
    manifest = model.manifest
    rows = manifest.per_layer_embeddings.rows
    return [[manifest.bos_token_id, *rng.integers(4, rows, length - 1).tolist()] for _ in range(count)]


def describe(parity: Parity) -> str:
    lines = [f"{parity.positions} positions against transformers (eager, fp32)"]
    weights = "the weights" if parity.original is None else f"the weights as stored in {parity.precision}"
    prefill_weights = f"{weights}, the prompt on those of its own graph"
    for title, compared in ((weights, parity.graph), (prefill_weights, parity.prefill)):
        if compared is not None:
            lines += _described(f"on {title}", compared.errors)
            if compared.rounded is not None:
                lines += _described("  the same graphs, activations not rounded to int8", compared.rounded.exact)
                lines += _described("  what rounding them costs transformers", compared.rounded.cost)
    if parity.original is not None:
        lines += _described("on the original weights", parity.original)
    rounded = parity.graph.rounded is not None
    bound = f", activations not rounded; rounded, {AS_MUCH:g} times what it costs transformers" if rounded else ""
    verdict = "PASS" if parity.passed else "FAIL"
    lines.append(f"{verdict} (tolerance on {weights}: {parity.tolerance:.0e} of the range{bound})")
    return "\n".join(lines)


def _described(title: str, errors: Errors) -> list[str]:
    margin = title[: len(title) - len(title.lstrip())]
    return [
        f"{title}:",
        f"{margin}  max logit error   {errors.max_error:.3e}, {errors.relative_error:.3e} of the range "
        f"{errors.logit_range:.2f}",
        f"{margin}  KL mean / max     {errors.mean_kl:.3e} / {errors.max_kl:.3e} nats",
        f"{margin}  greedy agreement  {errors.greedy_agreement:.2%}",
    ]


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


@dataclass
class _Logits:
    """Of all texts, one after the other [positions, V]; `prefill`: with the prefill graph reading the prompts."""

    graph: np.ndarray
    prefill: np.ndarray | None = None


def _continue(engine: Engine, prompt: list[int], new_tokens: int) -> tuple[list[int], np.ndarray]:
    """The token ids read, and the artifact's logits [positions, V] at the last of them."""
    if engine.manifest.logits == "all":
        return prompt, engine.evaluate(prompt)
    cache = engine.new_cache(1, len(prompt) + new_tokens)
    steps = [engine.prefill(cache, 0, prompt)]
    decoder = engine.step_runner(cache)
    ids = list(prompt)
    while len(steps) < new_tokens:
        ids.append(int(steps[-1].argmax()))
        steps.append(decoder.step(np.array(ids[-1:]), np.array([True]))[0].copy())
    return ids, np.stack(steps)


def _read_all(engine: Engine, texts: Sequence[list[int]], last: int | None) -> np.ndarray:
    """Logits [positions, V] at the `last` positions of each text, or at all."""
    return np.concatenate([engine.evaluate(ids) if last is None else _read(engine, ids, last) for ids in texts])


def _read(engine: Engine, ids: list[int], last: int) -> np.ndarray:
    cache = engine.new_cache(1, len(ids))
    prompt = len(ids) - last + 1
    steps = [engine.prefill(cache, 0, ids[:prompt])]
    decoder = engine.step_runner(cache)
    steps += [decoder.step(np.array([token]), np.array([True]))[0].copy() for token in ids[prompt:]]
    return np.stack(steps)


def _exact_logits(model: OnnxGemma3n, texts: Sequence[list[int]], last: int | None) -> _Logits:
    """Of the artifact's graphs with activations that are not rounded."""
    engine = Engine(model.folder, model.manifest, exact_provider(model.engine.provider), memory_budget=0)
    logits = _Logits(graph=_read_all(engine, texts, last))
    if model.manifest.prefill is not None:
        engine.prefill_graph.load()
        logits.prefill = _read_all(engine, texts, last)
    return logits


def _errors(ours: np.ndarray, theirs: np.ndarray) -> Errors:
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
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
