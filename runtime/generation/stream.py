"""Streaming generation of one batch of prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from gemma3n_onnx.runtime.system import peak_memory_bytes
from gemma3n_onnx.runtime.tokens import PromptTokens

from .logprobs import TokenLogprob
from .options import GenerationOptions
from .result import GenerationResult, batch_timings
from .scheduler import Event, FailureEvent, FinishEvent, Request, Scheduler, TokenEvent


class GenerationStream:
    """Iterate for pieces of text; `results()` and `result` hold what has been generated so far.

    Not for several threads at once, except for `cancel`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        prompts: Sequence[PromptTokens],
        options: GenerationOptions,
        *,
        check: Callable[[str], None] | None = None,
        text_of: Callable[[int], str] | None = None,
        turns: AbstractContextManager[object] | None = None,
    ) -> None:
        """Raises ContextLengthError as `Scheduler.submit` does.

        Args:
            check: raises a Gemma3nError for a whole answer that is not accepted.
            text_of: the text of a token, for log-probabilities.
            turns: held during each step, so that streams of one engine in several threads take turns.
        """
        self._scheduler, self._options = scheduler, options
        self._check = check
        self._turns = nullcontext() if turns is None else turns
        self._sequences = [_Sequence() for _ in prompts]
        self._pieces: list[str] = []
        # The callback holds lists, not this stream: a reference cycle would keep the KV cache until garbage collection.
        self._requests = [
            Request(prompt, options, partial(_take, sequence, self._pieces, text_of))
            for prompt, sequence in zip(prompts, self._sequences)
        ]
        for request in self._requests:
            scheduler.submit(request)
        self._running = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._running)

    def close(self) -> None:
        """Ends generation early."""
        self.cancel()  # even if iteration has not begun
        self._running.close()

    def cancel(self) -> None:
        """Ends generation at the next step; may be called from any thread."""
        for request in self._requests:
            request.cancel()

    def _run(self) -> Generator[str, None, None]:
        for request in self._requests:
            request.submitted = time.monotonic()
        try:
            while self._advance():
                yield from self._new_pieces()
            yield from self._new_pieces()
        finally:
            self.cancel()
        for sequence in self._sequences:
            if self._check is not None and sequence.is_whole:
                self._check("".join(sequence.text))

    def _advance(self) -> bool:
        with self._turns:
            return self._scheduler.advance()

    def _new_pieces(self) -> list[str]:
        """The pieces since the last call. Raises the first failure."""
        for sequence in self._sequences:
            if sequence.error is not None:
                raise sequence.error
        pieces = [*self._pieces]
        self._pieces.clear()
        return pieces

    def results(self) -> list[GenerationResult]:
        timings = batch_timings([request.timings for request in self._requests], peak_memory_bytes())
        return [
            GenerationResult(
                text="".join(sequence.text),
                token_ids=tuple(sequence.token_ids),
                prompt_token_ids=tuple(request.prompt.ids),
                finish_reason=sequence.finish_reason,
                logprobs=None if self._options.logprobs is None else tuple(sequence.logprobs),
                timings=timings,
                warnings=request.prompt.warnings,
            )
            for request, sequence in zip(self._requests, self._sequences)
        ]

    @property
    def result(self) -> GenerationResult:
        return self.results()[0]


class _Sequence:
    """What the scheduler has emitted for one prompt."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.text: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self.is_whole = False
        self.error: Exception | None = None


def _take(sequence: _Sequence, pieces: list[str], text_of: Callable[[int], str] | None, event: Event) -> None:
    match event:
        case TokenEvent():
            sequence.token_ids.append(event.token_id)
            sequence.text.append(event.text)
            if event.logprob is not None:
                sequence.logprobs.append(event.logprob if text_of is None else event.logprob.with_texts(text_of))
            if event.text:
                pieces.append(event.text)
        case FinishEvent():
            sequence.finish_reason, sequence.is_whole = event.reason, event.is_whole
        case FailureEvent():
            sequence.error = event.error
