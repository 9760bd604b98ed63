"""What the parity tests share: transformers as the oracle, and the measure of an error.

The oracle is `Gemma3nForCausalLM` with eager attention in fp32. An error is the largest absolute difference
of two sets of logits, as a share of the range that the oracle's span.

Shape legend: N positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import Gemma3nForCausalLM, GenerationConfig

from gemma3n_onnx.runtime import OnnxGemma3n
from gemma3n_onnx.runtime.tokens import SoftTokenSpan

TOLERANCE = 1e-4  # fp32 through tens of layers, between two implementations
SAME_GRAPH = 1e-5  # the same graph fed in another way: only the order of sums differs

WINDOW = 16  # of the tiny checkpoint
LONG = 2 * WINDOW + 9  # tokens: a windowed cache has dropped some more than once


class NoProgress:
    def stage(self, title: str) -> None: ...
    def total(self, work: float) -> None: ...
    def done(self, work: float) -> None: ...


def load_oracle(folder: Path) -> Gemma3nForCausalLM:
    oracle = Gemma3nForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    oracle.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    read_row_0_above_the_table(oracle)
    return oracle


def read_row_0_above_the_table(oracle: Gemma3nForCausalLM) -> None:
    """Has a text model do so with ids above the per-layer table, as transformers' does from 5.23 on, and its multimodal
    model always has."""

    def in_table(table: torch.nn.Embedding, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        (ids,) = arguments
        return (torch.where(ids < table.num_embeddings, ids, 0),)

    oracle.model.embed_tokens_per_layer.register_forward_pre_hook(in_table)


def oracle_logits(oracle: Gemma3nForCausalLM, ids: Sequence[int], last: int | None = None) -> np.ndarray:
    """fp32 [N, V] at the `last` (or all) positions of `ids`, in one pass without a cache."""
    with torch.no_grad():
        logits = oracle(torch.tensor([list(ids)]), use_cache=False, logits_to_keep=last or len(ids)).logits
    return logits[0].numpy()


def oracle_tokens(oracle: Gemma3nForCausalLM, prompt: Sequence[int], steps: int) -> list[int]:
    """transformers' own greedy generation, with its cache; no token ends it."""
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        made = oracle.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps)
    return made[0, len(prompt) :].tolist()


@dataclass(frozen=True)
class Greedy:
    """`logits` [N, V] are those that `tokens` [N] are the maxima of."""

    prompt: list[int]
    tokens: list[int]
    logits: np.ndarray

    @property
    def oracle_ids(self) -> list[int]:
        """What the oracle has to read for logits at the same positions."""
        return [*self.prompt, *self.tokens[:-1]]


def generate_greedily(
    model: OnnxGemma3n, prompt: Sequence[int], steps: int, spans: Sequence[SoftTokenSpan] = ()
) -> Greedy:
    """The engine's prefill and decode steps; no token ends it."""
    cache = model.engine.new_cache(1, len(prompt) + steps)
    logits = [model.engine.prefill(cache, 0, prompt, spans).copy()]
    decoder = model.engine.step_runner(cache)
    while len(logits) < steps:
        token = np.array([logits[-1].argmax()])
        logits.append(decoder.step(token, np.array([True]))[0].copy())
    return Greedy(list(prompt), [int(x.argmax()) for x in logits], np.stack(logits))


def random_prompt(length: int, seed: int = 0, vocab_size: int = 1024) -> list[int]:
    """<bos>, then any ids of the vocabulary but the first few special ones."""
    return [2, *np.random.default_rng(seed).integers(5, vocab_size, length - 1).tolist()]


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    assert np.isfinite(ours).all()
    return float(np.abs(ours.astype(np.float64) - theirs).max() / (theirs.max() - theirs.min()))


def assert_close(what: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> float:
    """Prints the measured error (pytest shows it with -rP), then asserts it."""
    error = relative_error(ours, theirs)
    print(f"{what}: error {error:.2e} of the range (tolerance {tolerance:.0e})")
    assert error <= tolerance
    return error


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl_divergence(theirs: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """KL(theirs || ours) in nats for each row [N]."""
    p, q = log_softmax(theirs), log_softmax(ours)
    return (np.exp(p) * (p - q)).sum(-1)
