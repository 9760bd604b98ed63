"""Perplexity of a text."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gemma3n_onnx.runtime.checks import require_integer
from gemma3n_onnx.runtime.errors import OptionError, PromptError
from gemma3n_onnx.runtime.model import OnnxGemma3n
from gemma3n_onnx.runtime.tokens import PromptTokens

WINDOW = 2048


@dataclass(frozen=True)
class Perplexity:
    """`log_likelihood` is the natural-log probability of the whole text, of `tokens` tokens, `words` words separated by
    whitespace, and `bytes` bytes of UTF-8."""

    log_likelihood: float
    tokens: int
    words: int
    bytes: int

    @property
    def per_token(self) -> float:
        return _exp(-self.log_likelihood / self.tokens)

    @property
    def per_word(self) -> float:
        """Infinite if it exceeds a float, as of a long text without whitespace."""
        return _exp(-self.log_likelihood / self.words)

    @property
    def bits_per_byte(self) -> float:
        return -self.log_likelihood / self.bytes / math.log(2)


def _exp(value: float) -> float:
    return math.exp(value) if value < math.log(sys.float_info.max) else math.inf


def perplexity(
    model: OnnxGemma3n,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Scores each token of a text once, in windows of `window` tokens that begin with <bos>.

    Args:
        window: tokens of a window; by default 2,048, or the artifact's context if that is less.
        stride: tokens that each window but the first scores; the others before them are context. By default all:
            windows do not overlap.
        progress: receives the number of scored tokens and of all.

    Raises:
        PromptError: the text is empty. OptionError: a window beyond the context, or a stride beyond the window.
        ArtifactError: the artifact has no scorer.
    """
    context = model.manifest.max_context
    window = min(WINDOW, context) if window is None else window
    require_integer("window", window, 2)
    if window > context:
        raise OptionError(f"The window of {window:,} tokens exceeds the artifact's context of {context:,}; use less.")
    stride = window - 1 if stride is None else stride
    require_integer("stride", stride, 1)
    if stride >= window:
        raise OptionError(
            f"The stride is {stride:,}, but a window of {window:,} scores {window - 1:,} tokens; use less."
        )
    ids = model.tokenizer.encode(text, add_bos=False)
    if not ids:
        raise PromptError("The text is empty; give one to score.")
    total, done = 0.0, 0
    for begin, first, end in windows(len(ids), window - 1, stride):
        prompt = PromptTokens([model.manifest.bos_token_id, *ids[begin:end]])
        scores = model.engine.score(prompt, 1 + first - begin)
        total += float(scores.logprobs.sum(dtype="float64"))
        done += end - first
        if progress is not None:
            progress(done, len(ids))
    return Perplexity(total, len(ids), max(len(text.split()), 1), len(text.encode()))


def windows(count: int, size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Begin, first scored token and end of each window over `count` tokens: the first window scores all of its tokens,
    each later one its last `stride`."""
    first, end = 0, min(size, count)
    while first < count:
        yield max(end - size, 0), first, end
        first, end = end, min(end + stride, count)
