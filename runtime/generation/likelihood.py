"""Log-likelihoods of given text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gemma3n_onnx.runtime.engine.scorer import TokenScores

from .logprobs import TokenLogprob, TopToken


@dataclass(frozen=True)
class LogLikelihood:
    """Natural-log probabilities of a continuation's tokens, each given all tokens before it.

    `tokens` list each token's log-probability, and the most likely token at its position.
    """

    tokens: tuple[TokenLogprob, ...]

    @property
    def total(self) -> float:
        """The log-probability of the whole continuation."""
        return sum(token.logprob for token in self.tokens)

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding generates the continuation."""
        return all(token.token_id == token.top[0].token_id for token in self.tokens)


def token_logprobs(ids: Sequence[int], scores: TokenScores, top: int) -> tuple[TokenLogprob, ...]:
    """The scores of the tokens `ids` [n], with the `top` most likely tokens at each position."""
    listed = zip(scores.top_ids[:, :top].tolist(), scores.top_logprobs[:, :top].tolist())
    return tuple(
        TokenLogprob(token, logprob, tuple(map(TopToken, *tops)))
        for token, logprob, tops in zip(ids, scores.logprobs.tolist(), listed)
    )
