"""The sensitivity of a decoder to quantization, tensor by tensor: weight error and effect on the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.export.slicing import Slice
from gemma3n_onnx.export.text_weights import HEAD, PER_LAYER, TOKENS, tensor_shapes
from gemma3n_onnx.export.verify.parity import kl_divergence
from gemma3n_onnx.export.verify.reference import StorageOf, decoder_logits, load_decoder, load_hard_rows
from gemma3n_onnx.export.weights import as_stored

from .config import QuantizationConfig


@dataclass(frozen=True)
class Sensitivity:
    """One tensor, quantized alone. `error` is the norm of its quantization error relative to its norm; `kl` the mean KL
    divergence of the logits, in nats, from the logits with the original weights."""

    name: str
    scheme: str
    error: float
    kl: float


@dataclass(frozen=True)
class Report:
    """`tensors` by descending KL divergence; `kl_all` is the divergence with all of them quantized."""

    slice: str
    precision: str
    positions: int
    kl_all: float
    tensors: tuple[Sensitivity, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def sensitivities(
    checkpoint: Checkpoint,
    chosen: Slice,
    precision: str,
    storage_of: StorageOf,
    prompts: Sequence[Sequence[int]],
    progress: Callable[[int, int], None],
) -> Report:
    """Runs transformers' decoder in fp32 once for each tensor that `storage_of` quantizes; `progress(done, total)`.

    Needs memory for the decoder in fp32 (E2B: 10 GB) without the per-layer embeddings, which are read row by row.

    Raises:
        ExportError: transformers cannot build the decoder.
    """
    decoder: Any = load_decoder(checkpoint, chosen)
    names = tensor_shapes(chosen.config)
    configs = {name: config for name in names if isinstance(config := storage_of(name), QuantizationConfig)}
    run = lambda: _logits(decoder, prompts)  # noqa: E731
    original = run()
    found = []
    for done, (name, config) in enumerate(configs.items()):
        progress(done, len(configs) + 1)
        with _stored(checkpoint, decoder, name, config) as error:
            found.append(Sensitivity(name, str(config), error, _mean_kl(original, run())))
    progress(len(configs), len(configs) + 1)
    whole = _logits(load_decoder(checkpoint, chosen, storage_of), prompts)
    progress(len(configs) + 1, len(configs) + 1)
    return Report(
        slice=chosen.name,
        precision=precision,
        positions=len(original),
        kl_all=_mean_kl(original, whole),
        tensors=tuple(sorted(found, key=lambda tensor: -tensor.kl)),
    )


def _logits(decoder: nn.Module, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    return np.concatenate([decoder_logits(decoder, list(ids), len(ids)) for ids in prompts])


def _mean_kl(original: np.ndarray, found: np.ndarray) -> float:
    return float(kl_divergence(original, found).mean())


@contextmanager
def _stored(checkpoint: Checkpoint, decoder: Any, name: str, config: QuantizationConfig) -> Iterator[float]:
    """Quantizes one tensor in this context; yields its error."""
    if name == PER_LAYER:
        table: Any = decoder.model.embed_tokens_per_layer
        before, table.storage = table.storage, config
        try:
            yield table.sampled_error(config)
        finally:
            table.storage = before
        return
    parameter = _parameter(decoder, name)
    original = parameter.data
    parameter.data = as_stored(original, config)
    embeddings: Any = decoder.model.embed_tokens
    hard = getattr(embeddings, "rows", None) if name == TOKENS else None
    if hard is not None:
        embeddings.rows = load_hard_rows(checkpoint, config)
    try:
        yield float((parameter.data - original).norm() / original.norm())
    finally:
        parameter.data = original
        if hard is not None:
            embeddings.rows = hard


def _parameter(decoder: Any, name: str) -> nn.Parameter:
    if name == HEAD:
        return decoder.lm_head.weight
    return decoder.model.get_parameter(name)
