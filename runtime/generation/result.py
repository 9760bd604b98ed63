"""Results and timings of a generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .logprobs import TokenLogprob


@dataclass(frozen=True)
class Timings:
    """Seconds and tokens of one generation; the prompts of a batch share them. Rates count the tokens of all rows.

    `encoder_seconds`: time in the image and audio encoders, loading at first use included. `cached_tokens`: prompt
    tokens reused from an earlier prompt. `time_to_first_token` is the first row's.
    """

    encoder_seconds: float
    cached_tokens: int
    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float
    time_to_first_token: float
    peak_memory_bytes: int | None

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass
class RowTimings:
    """Timings of one running row; the seconds of a decode step count for every row in it."""

    encoder_seconds: float = 0.0
    cached_tokens: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    time_to_first_token: float = 0.0


def batch_timings(rows: Sequence[RowTimings], peak_memory_bytes: int | None) -> Timings:
    """Timings of rows that were prefilled one after another and decoded together."""
    started = [row.time_to_first_token for row in rows if row.time_to_first_token]
    return Timings(
        encoder_seconds=sum(row.encoder_seconds for row in rows),
        cached_tokens=sum(row.cached_tokens for row in rows),
        prefill_tokens=sum(row.prefill_tokens for row in rows),
        prefill_seconds=sum(row.prefill_seconds for row in rows),
        decode_tokens=sum(row.decode_tokens for row in rows),
        decode_seconds=max(row.decode_seconds for row in rows),
        time_to_first_token=min(started, default=0.0),
        peak_memory_bytes=peak_memory_bytes,
    )


@dataclass(frozen=True)
class GenerationResult:
    """One answer.

    `text` excludes special tokens and everything from a stop string on; `token_ids` has all generated tokens.
    `finish_reason` is "stop" (an end token or a stop string) or "length" (`max_new_tokens`), and None of a stream that
    has not ended, or was closed. `warnings`: one sentence
    for each image or clip of the prompt whose file is incomplete; what there is of it was read.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: str | None
    logprobs: tuple[TokenLogprob, ...] | None
    timings: Timings
    warnings: tuple[str, ...] = ()
