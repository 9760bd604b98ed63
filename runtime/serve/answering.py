"""A parsed request as sequences of the scheduler, and their events as choices; independent of the API's form."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self

from gemma3n_onnx.runtime.constraints.grammar import Constraint
from gemma3n_onnx.runtime.generation.logprobs import TokenLogprob
from gemma3n_onnx.runtime.generation.options import GenerationOptions
from gemma3n_onnx.runtime.generation.scheduler import (
    Event,
    FailureEvent,
    FinishEvent,
    PromptEvent,
    Request,
    TokenEvent,
)
from gemma3n_onnx.runtime.tokens import PromptTokens

from .model_pool import Served
from .worker import to_gemma3n_error

AnswerEvent = PromptEvent | TokenEvent | FinishEvent


@dataclass(frozen=True)
class ParsedRequest:
    """Each of its prompts is answered `n` times. `prompt_logprobs` and `generates` as in `Request`.

    `constrain` makes the constraint of the answers, which may take a second. `check` raises a Gemma3nError for a whole
    answer that it does not accept, see `FinishEvent.is_whole`.
    """

    prompts: list[PromptTokens]
    options: GenerationOptions
    n: int = 1
    prompt_logprobs: int | None = None
    generates: bool = True
    constrain: Callable[[], Constraint | None] | None = None
    check: Callable[[str], None] | None = None

    def constrained(self) -> Self:
        """The request with its answers held to the constraint. Raises OptionError for one that cannot be followed."""
        constraint = None if self.constrain is None else self.constrain()
        if constraint is None:
            return self
        options = replace(self.options, logits_processor=constraint.processor)
        return replace(self, options=options, constrain=None, check=constraint.check)

    @property
    def warnings(self) -> dict[str, list[str]]:
        """A field for the body of the response, not OpenAI's; none if all media of the request are complete."""
        told = [warning for prompt in self.prompts for warning in prompt.warnings]
        return {"warnings": told} if told else {}


class Answering:
    """The sequences of one HTTP request; their events reach the event loop that made it."""

    def __init__(
        self, parsed: ParsedRequest, served: Served, deadline: float, on_first_token: Callable[[float], None]
    ) -> None:
        """`on_first_token` is given the seconds from submission to each sequence's first token.

        Raises the errors of `ModelWorker.submit`.
        """
        loop = asyncio.get_running_loop()
        # lm-evaluation-harness asks for one token after a scored prompt and drops the last log-probability.
        self._unlisted = set[int]()
        if parsed.prompt_logprobs is None:
            self._unlisted = {*served.model.manifest.eos_token_ids, *parsed.options.stop_token_ids}
        self._n = parsed.n
        self._check, self._texts = parsed.check, defaultdict[int, str](str)
        self._on_first_token = on_first_token
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

        def put(index: int, event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        self.requests = [
            Request(
                prompt,
                parsed.options,
                partial(put, index),
                sample=index % parsed.n,
                deadline=deadline,
                prompt_logprobs=parsed.prompt_logprobs if index % parsed.n == 0 else None,
                generates=parsed.generates,
            )
            for index, prompt in enumerate(prompt for prompt in parsed.prompts for _ in range(parsed.n))
        ]
        served.worker.submit(self.requests)

    def __len__(self) -> int:
        return len(self.requests)

    async def events(self) -> AsyncIterator[tuple[int, AnswerEvent]]:
        """With the index of the choice, in order of time; ends when all choices have. End tokens report no
        log-probability, except after a scored prompt. Raises the first failure as a Gemma3nError."""
        unfinished = len(self.requests)
        started: set[int] = set()
        while unfinished:
            index, event = await self._events.get()
            if isinstance(event, FailureEvent):
                raise to_gemma3n_error(event.error)
            if isinstance(event, PromptEvent):  # a prompt is scored once for its answers
                for choice in range(index, index + self._n):
                    yield choice, event
                continue
            if index not in started and isinstance(event, TokenEvent):
                started.add(index)
                self._on_first_token(self.requests[index].timings.time_to_first_token)
            yield index, self._checked(index, event)
            unfinished -= isinstance(event, FinishEvent)

    def _checked(self, index: int, event: TokenEvent | FinishEvent) -> AnswerEvent:
        if isinstance(event, FinishEvent):
            if self._check is not None and event.is_whole:
                self._check(self._texts[index])
            return event
        if self._check is not None:
            self._texts[index] += event.text
        unlisted = event.token_id in self._unlisted and event.logprob is not None
        return replace(event, logprob=None) if unlisted else event

    def cancel(self) -> None:
        for request in self.requests:
            request.cancel()


@dataclass
class Choice:
    """One choice of a response, accumulated from its events."""

    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    end: FinishEvent | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def add(self, event: AnswerEvent) -> None:
        if isinstance(event, FinishEvent):
            self.end = event
            return
        if isinstance(event, PromptEvent):
            self.prompt_logprobs = event.logprobs
            return
        self.pieces.append(event.text)
        if event.logprob is not None:
            self.logprobs.append(event.logprob)


async def collect(answering: Answering) -> list[Choice]:
    choices = [Choice() for _ in range(len(answering))]
    async for index, event in answering.events():
        choices[index].add(event)
    return choices
