"""Log-probabilities of generated tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .logits_processors import relative_weights, top_k_positions


class TopToken(NamedTuple):
    """One of the most likely tokens; `text` as in `TokenLogprob`."""

    token_id: int
    logprob: float
    text: str = ""


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probabilities of the chosen token and of the top tokens, most likely first.

    `text` is that of the token alone; a byte of a character is written `\\xe2`. The results of `generate`, `stream` and
    `log_likelihood` have it.
    """

    token_id: int
    logprob: float
    top: tuple[TopToken, ...]
    text: str = ""

    def with_texts(self, text_of: Callable[[int], str]) -> TokenLogprob:
        top = tuple(each._replace(text=text_of(each.token_id)) for each in self.top)
        return replace(self, top=top, text=text_of(self.token_id))


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
        top=tuple(TopToken(int(token), float(logits[token]) - log_total) for token in likeliest),
    )
