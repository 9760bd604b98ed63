"""Parity of an artifact with transformers, on the checkpoint that it was exported from."""

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
from gemma3n_onnx.export.slicing import choose_slice
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

# Maximum logit error relative to the logit range, by the artifact's compute dtype, against transformers in fp32 on the
# stored (dequantized) weights.
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 8e-2}
# Two implementations that round activations to int8 have errors of similar size but different direction, so the
# tolerance is this multiple of the rounding error in transformers.
AS_MUCH = 2.0


@dataclass(frozen=True)
class Errors:
    """Differences of two sets of logits. `logit_range` is the range of the reference's logits; KL is in nats."""

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
    """Errors of products with int8 activations. `exact`: of the artifact's graphs with unrounded activations. `cost`:
    of the same rounding in transformers."""

    exact: Errors
    cost: Errors


@dataclass(frozen=True)
class Compared:
    """`errors` of the artifact against transformers on the stored weights."""

    errors: Errors
    rounded: Rounded | None

    def passed(self, tolerance: float) -> bool:
        if self.rounded is None:
            return self.errors.relative_error <= tolerance
        as_much = AS_MUCH * self.rounded.cost.relative_error
        return self.rounded.exact.relative_error <= tolerance and self.errors.relative_error <= as_much


@dataclass(frozen=True)
class Parity:
    """`graph`: against the stored weights. `prefill`: the same with prompts run by the prefill graph; None without one.
    `original`: against the checkpoint's weights, so with the storage error; None if storage is lossless. `passed`
    checks the first two."""

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
    """Compares logits with transformers (eager attention, fp32) at the positions that the artifact outputs.

    The artifact continues each prompt greedily; transformers then reads prompt and continuation in one
    pass without a cache, so the two share only the token ids. An artifact with all logits is compared at
    every position instead.

    Graphs with int8 activations are compared twice: as they run, with a tolerance derived from the error of the same
    rounding in transformers, and with unrounded activations, with the usual tolerance.

    Raises:
        ExportError: the artifact was not exported from this checkpoint and slice.
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
    """`count` prompts of `length` tokens: <bos>, then any ids but the first few special ones."""
    manifest = model.manifest
    return [[manifest.bos_token_id, *rng.integers(4, manifest.vocab_size, length - 1).tolist()] for _ in range(count)]


def describe(parity: Parity) -> str:
    lines = [f"{parity.positions} positions against transformers (eager, fp32)"]
    weights = "the weights" if parity.original is None else f"the weights as stored in {parity.precision}"
    prefill_weights = f"{weights}, the prompt on those of its own graph"
    for title, compared in ((weights, parity.graph), (prefill_weights, parity.prefill)):
        if compared is not None:
            lines += _described(f"on {title}", compared.errors)
            if compared.rounded is not None:
                lines += _described("  the same graphs with unrounded activations", compared.rounded.exact)
                lines += _described("  transformers with activations rounded to int8", compared.rounded.cost)
    if parity.original is not None:
        lines += _described("on the original weights", parity.original)
    rounded = parity.graph.rounded is not None
    bound = f" with unrounded activations, {AS_MUCH:g} times the error of rounding with int8 ones" if rounded else ""
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
            f"{widths[0]} channels and {widths[2]} tokens, but --model with --slice gives {config.num_layers}, "
            f"{config.hidden_size} and {config.vocab_size}; give the checkpoint and slice it was made from."
        )
    parameters = parameter_counts(config).text
    if parameters != manifest.parameters.text:
        raise ExportError(
            f"The artifact, slice {manifest.slice!r} of {manifest.source}, has {manifest.parameters.text:,} text "
            f"parameters, but --model with --slice gives {parameters:,}; give the checkpoint, slice and slice table "
            "it was made from."
        )


def _keeps_all(checkpoint: Checkpoint, manifest: Manifest) -> bool:
    """Whether storage is lossless."""
    if manifest.quantization:
        return False
    storage = manifest.storage
    dtypes = {checkpoint.spec(name).dtype for name in checkpoint.text_names()}
    return storage == "fp32" or (storage == "bf16" and dtypes == {"BF16"}) or (storage == "fp16" and dtypes == {"F16"})


@dataclass
class _Logits:
    """Logits [positions, V] of all texts, concatenated; `prefill`: with prompts run by the prefill graph."""

    graph: np.ndarray
    prefill: np.ndarray | None = None


def _continue(engine: Engine, prompt: list[int], new_tokens: int) -> tuple[list[int], np.ndarray]:
    """The token ids, and the artifact's logits [positions, V] at the last positions."""
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
    """Logits [positions, V] at the `last` positions of each text; at all positions for None."""
    return np.concatenate([engine.evaluate(ids) if last is None else _read(engine, ids, last) for ids in texts])


def _read(engine: Engine, ids: list[int], last: int) -> np.ndarray:
    cache = engine.new_cache(1, len(ids))
    prompt = len(ids) - last + 1
    steps = [engine.prefill(cache, 0, ids[:prompt])]
    decoder = engine.step_runner(cache)
    steps += [decoder.step(np.array([token]), np.array([True]))[0].copy() for token in ids[prompt:]]
    return np.stack(steps)


def _exact_logits(model: OnnxGemma3n, texts: Sequence[list[int]], last: int | None) -> _Logits:
    """Logits of the artifact's graphs with unrounded activations."""
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
