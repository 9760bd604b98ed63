"""Log-probabilities of generated tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .logits_processors import relative_weights, top_k_positions


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probabilities of the chosen token and of the top tokens, most likely first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def log_probabilities(logits: np.ndarray, chosen: int, top: int) -> TokenLogprob:
    """Log-probabilities under softmax(logits), for the model's raw logits float32 [V].

    Penalties, temperature and filters are not applied. `top` is the number of top tokens to list, which may
    include the chosen one; ties are ordered by id, and tokens of probability 0 are omitted.
    """
    log_total = float(logits.max()) + math.log(relative_weights(logits).sum(dtype=np.float64))
    likeliest = top_k_positions(logits, top) if top else np.empty(0, np.int64)
    likeliest = likeliest[np.argsort(-logits[likeliest], kind="stable")][:top]
    return TokenLogprob(
        token_id=chosen,
        logprob=float(logits[chosen]) - log_total,
        top=tuple((int(token), float(logits[token]) - log_total) for token in likeliest),
    )
