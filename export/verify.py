"""Parity of an artifact with transformers, on the checkpoint that it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gemma3n_onnx.graphs.config import TextConfig
from gemma3n_onnx.runtime.generation import check_context
from gemma3n_onnx.runtime.model import OnnxGemma3n

from .checkpoint import Checkpoint
from .encoders import find_hard_tokens
from .errors import ExportError
from .pipeline import choose_slice, tensor_shapes
from .slicing import Slice, TensorCut
from .verify_encoders import load_hard_rows
from .weights import check_tensors, read_cut, rounded

# Largest logit error as a share of the logit range, by the dtype that the artifact computes in, against
# transformers in fp32 on the weights as the artifact stores them.
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 8e-2}


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
    """`graph`: against the weights as stored, which is what the verdict is on. `original`: against the
    checkpoint's own weights, so with what the storage precision costs; None where storing loses nothing."""

    positions: int
    storage: str
    tolerance: float
    graph: Errors
    original: Errors | None

    @property
    def passed(self) -> bool:
        return self.graph.relative_error <= self.tolerance


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
    chosen = choose_slice(checkpoint.text_config, slice_name, table)
    _check_same_architecture(model, chosen.config)
    check_tensors(checkpoint, chosen, tensor_shapes(chosen.source))
    continued = [_our_logits(model, list(prompt), new_tokens) for prompt in prompts]
    ours = np.concatenate([logits for _, logits in continued])
    storage = manifest.token_embeddings.dtype

    def compare(stored_as: str | None) -> Errors:
        reference = load_reference(checkpoint, chosen, stored_as)
        theirs = [reference_logits(reference, ids, len(logits)) for ids, logits in continued]
        return _errors(ours, np.concatenate(theirs))

    return Parity(
        positions=len(ours),
        storage=storage,
        tolerance=TOLERANCE[manifest.compute_dtype],
        graph=compare(storage),
        original=None if _keeps_all(checkpoint, storage) else compare(None),
    )


def random_prompts(model: OnnxGemma3n, rng: np.random.Generator, count: int, length: int) -> list[list[int]]:
    """`count` prompts of `length` tokens: <bos>, then ids of the text vocabulary."""
    manifest = model.manifest
    rows = manifest.per_layer_embeddings.rows
    return [[manifest.bos_token_id, *rng.integers(4, rows, length - 1).tolist()] for _ in range(count)]


def describe(parity: Parity) -> str:
    lines = [f"{parity.positions} positions against transformers (eager, fp32)"]
    of_weights = "the weights" if parity.original is None else f"the weights rounded to {parity.storage}"
    for title, errors in ((of_weights, parity.graph), ("the original weights", parity.original)):
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


def load_reference(checkpoint: Checkpoint, chosen: Slice, stored_as: str | None = None) -> nn.Module:
    """transformers' Gemma 3n text model in fp32, holding the slice's weights, rounded to `stored_as`.

    The PLE table stays in the checkpoint's file and is read by rows, so that a full-size model fits.
    """
    from transformers import Gemma3nForCausalLM
    from transformers.models.gemma3n.configuration_gemma3n import Gemma3nTextConfig

    raw = chosen.hf_config(checkpoint.config)
    config = Gemma3nTextConfig(**raw.get("text_config", raw))
    with torch.device("meta"):
        reference = Gemma3nForCausalLM._from_config(config, attn_implementation="eager").eval()
    reference.model.embed_tokens_per_layer = _RowsFromCheckpoint(checkpoint, chosen, stored_as)
    state: dict[str, Tensor] = {}
    for name, parameter in reference.model.named_parameters():
        values = read_cut(checkpoint, chosen.source_of(name))
        if values.shape != parameter.shape:
            raise ExportError(f"Tensor {name} has shape {list(values.shape)}, not {list(parameter.shape)}.")
        state[name] = rounded(values.float(), stored_as)
    reference.model.load_state_dict(state, strict=True, assign=True)
    reference.lm_head.weight = reference.model.embed_tokens.weight
    _materialize_buffers(reference, config)
    if (hard_tokens := find_hard_tokens(checkpoint)) is not None:
        rows = load_hard_rows(checkpoint, stored_as)
        reference.model.embed_tokens = _WithHardRows(reference.model.embed_tokens, hard_tokens.rows.first_id, rows)
    return reference


class _WithHardRows(nn.Module):
    """Stands in for `embed_tokens` as in `Gemma3nModel.forward`: ids from `first_id` on have rows of their own."""

    def __init__(self, embed_tokens: nn.Module, first_id: int, rows: Tensor) -> None:
        super().__init__()
        self._embed_tokens, self._first_id, self._rows = embed_tokens, first_id, rows

    def forward(self, ids: Tensor) -> Tensor:
        hard = self._rows[(ids - self._first_id).clamp(min=0)]
        return torch.where((ids >= self._first_id)[..., None], hard, self._embed_tokens(ids))


class _RowsFromCheckpoint(nn.Module):
    """Stands in for `embed_tokens_per_layer`: scaled rows of ids, read from the file."""

    def __init__(self, checkpoint: Checkpoint, chosen: Slice, stored_as: str | None) -> None:
        super().__init__()
        self._checkpoint, self._stored_as = checkpoint, stored_as
        self._cut = chosen.source_of("embed_tokens_per_layer.weight")
        self._scale = chosen.config.hidden_size_per_layer_input**0.5

    def forward(self, ids: Tensor) -> Tensor:
        rows = [
            read_cut(self._checkpoint, TensorCut(self._cut.source, ((i, i + 1),), self._cut.columns))
            for i in ids.reshape(-1).tolist()
        ]
        scaled = torch.cat(rows).float() * self._scale
        return rounded(scaled, self._stored_as).reshape(*ids.shape, -1)


def _materialize_buffers(reference: nn.Module, config: Any) -> None:
    """Buffers are no part of a checkpoint; they follow from the config."""
    for name, module in reference.named_modules():
        for key, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = _buffer_value(name, key, module, config)


def _buffer_value(name: str, key: str, module: nn.Module, config: Any) -> Tensor:
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRotaryEmbedding

    if name.endswith("rotary_emb"):
        return dict(Gemma3nRotaryEmbedding(config).named_buffers())[key]
    values = {
        "embed_scale": getattr(module, "scalar_embed_scale", None),
        "router_input_scale": config.hidden_size**-1.0,
        "per_layer_projection_scale": config.hidden_size**-0.5,
        "per_layer_input_scale": 2.0**-0.5,
    }
    return torch.tensor(values[key])


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


def _keeps_all(checkpoint: Checkpoint, storage: str) -> bool:
    """Whether every value of the checkpoint can be stored as it is."""
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


def reference_logits(reference: nn.Module, ids: list[int], last: int) -> np.ndarray:
    """transformers' logits [last, V] at the last positions of `ids`."""
    with torch.no_grad():
        return reference(torch.tensor([ids]), use_cache=False, logits_to_keep=last).logits[0].numpy()


def _errors(ours: np.ndarray, theirs: np.ndarray) -> Errors:
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    kl = _kl(theirs, ours)
    return Errors(
        max_error=float(np.abs(ours - theirs).max()),
        logit_range=float(theirs.max() - theirs.min()),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        greedy_agreement=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    )


def _kl(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    """KL(p || q) in nats for each row."""
    p, q = (x - x.max(-1, keepdims=True) for x in (p_logits, q_logits))
    p -= np.log(np.exp(p).sum(-1, keepdims=True))
    q -= np.log(np.exp(q).sum(-1, keepdims=True))
    return (np.exp(p) * (p - q)).sum(-1)
