"""Continuous batching: a request joins the running batch when a row of its KV cache is free, and leaves when it ends.

One thread runs a model. Between the chunks of a prompt that joins, the others take a step each.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from gemma3n_onnx.runtime.engine.prefix_cache import PrefixCache
from gemma3n_onnx.runtime.errors import Gemma3nError, ProviderError
from gemma3n_onnx.runtime.generation.answer import AnswerText
from gemma3n_onnx.runtime.generation.choosing import Chooser
from gemma3n_onnx.runtime.generation.generation import check_context, finish_of
from gemma3n_onnx.runtime.generation.sampling import GenerationOptions, TokenLogprob
from gemma3n_onnx.runtime.model import OnnxGemma3n
from gemma3n_onnx.runtime.tokens import PromptTokens

log = logging.getLogger(__name__)


class BusyError(Gemma3nError, RuntimeError):
    """As many requests wait as may."""


class DeadlineError(Gemma3nError, TimeoutError):
    """A request took longer than it may."""


@dataclass(frozen=True)
class Piece:
    """One token: the text that it completes, which may be none, and its log-probability where asked for."""

    text: str
    logprob: TokenLogprob | None


@dataclass(frozen=True)
class End:
    """`finish` is "stop" or "length"; `cached_tokens` of the prompt were not run."""

    finish: str
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Failure:
    error: Gemma3nError


Event = Piece | End | Failure
Choice = tuple[int, TokenLogprob | None]


@dataclass(eq=False)
class Job:
    """One answer to be made. `tell` is called in the scheduler's thread; after an End or a Failure no more, and none of
    these comes after `cancel`. `sample` tells apart answers to one prompt."""

    prompt: PromptTokens
    options: GenerationOptions
    tell: Callable[[Event], None]
    sample: int = 0
    deadline: float = float("inf")
    submitted: float = field(default_factory=time.monotonic)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()


class _CancelledError(Exception):
    """Nobody waits for the answer any more."""


@dataclass
class _Row:
    job: Job
    chooser: Chooser
    text: AnswerText
    cached_tokens: int
    token: int = 0
    made: int = 0


@dataclass
class Counts:
    """What a scheduler has done so far; `first_token_seconds` of each request, for whoever takes them away."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    cancelled: int = 0
    first_token_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))


class Scheduler:
    """`rows` answers at once, each with its prompt within `context` tokens; `queue` more may wait."""

    def __init__(self, model: OnnxGemma3n, rows: int, context: int, queue: int, kept_prompts: int) -> None:
        self.model, self.context, self._queue_limit = model, context, queue
        self._cache = model.engine.new_cache(rows, context)
        on_cpu = model.engine.provider.device == "cpu"
        self._kept = PrefixCache(kept_prompts) if kept_prompts and on_cpu else None
        self._stages = on_cpu
        self._rows: dict[int, _Row] = {}
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.counts = Counts()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._rows)

    def submit(self, jobs: list[Job]) -> None:
        """All of them or none.

        Raises:
            BusyError: too many wait. ContextLengthError: one does not fit into a row.
        """
        for job in jobs:
            check_context(self.context, len(job.prompt), job.options.max_new_tokens)
        with self._changed:
            if self._closed or self.waiting + len(jobs) > self._queue_limit:
                raise BusyError("Too many requests wait for this model; try again later.")
            self._waiting.extend(jobs)
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread; what runs or waits fails."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # All below runs in the scheduler's thread.

    def _run(self) -> None:
        while True:
            job = self._next_job()
            if self._closed:
                break
            if job is not None:
                self._start(job)
            else:
                self._step()
        gone = Failure(ProviderError("The model was unloaded; send the request again."))
        for job in [*(row.job for row in self._rows.values()), *self._waiting]:
            job.tell(gone)
        self._rows.clear()
        self._waiting.clear()

    def _next_job(self) -> Job | None:
        """The first that waits, if a row is free; waits for one where nothing runs."""
        with self._changed:
            while not (self._closed or self._rows or self._waiting):
                self._changed.wait()
            if self._waiting and len(self._rows) < self._cache.rows:
                return self._waiting.popleft()
            return None

    def _start(self, job: Job) -> None:
        row = min(set(range(self._cache.rows)) - self._rows.keys())
        try:
            chooser = Chooser(job.options, job.prompt.ids, job.sample)
            logits, cached = self._prefill(row, job)
            self._rows[row] = _Row(job, chooser, AnswerText(self.model.tokenizer, job.options), cached)
            self.counts.prompt_tokens += len(job.prompt) - cached
            self.counts.cached_tokens += cached
            self._advance(row, *chooser.choose(logits))
            self.counts.first_token_seconds.append(time.monotonic() - job.submitted)
        except _CancelledError:
            self._leave(row)
        except Exception as error:
            self._fail(job, error)
            self._leave(row)

    def _prefill(self, row: int, job: Job) -> tuple[np.ndarray, int]:
        """Logits [V] after the prompt, which is in the cache then, and how many of its tokens were kept ones.

        On the CPU a prompt is run in a cache of its own: a step of the others computes along all rows up to the last,
        and its own windows would move.
        """
        engine, prompt = self.model.engine, job.prompt
        self._require_wanted(job)

        def between(_: int) -> None:
            self._require_wanted(job)
            if self._rows:
                self._step()

        if not self._stages:
            prompt = prompt.encoded()
            return engine.prefill(self._cache, row, prompt.ids, prompt.slots, between), 0
        staged = engine.new_cache(1, len(prompt))
        kept = self._kept.begin(prompt.keys(), staged) if self._kept else None
        cached = int(staged.lengths[0])
        rest = prompt.after(cached).encoded()
        if self._kept and kept is not None:
            logits = self._kept.run(engine, kept, rest, between)
        else:
            logits = engine.prefill(staged, 0, rest.ids, rest.slots, between)
        self._cache.fill_row(row, staged)
        return logits, cached

    def _step(self) -> None:
        """One more token for every row."""
        for row, state in [*self._rows.items()]:
            try:
                self._require_wanted(state.job)
            except _CancelledError:
                self._leave(row)
            except DeadlineError as error:
                self._fail(state.job, error)
                self._leave(row)
        if not self._rows:
            return
        count = max(self._rows) + 1
        tokens = np.full(count, self.model.manifest.pad_token_id, dtype=np.int64)
        running = np.zeros(count, dtype=bool)
        for row, state in self._rows.items():
            tokens[row], running[row] = state.token, True
        try:
            choices = self._choices(tokens, running)
        except Exception as error:
            for row, state in [*self._rows.items()]:
                self._fail(state.job, error)
                self._leave(row)
            return
        for row, choose in choices.items():
            try:
                self._advance(row, *choose())
            except Exception as error:
                self._fail(self._rows[row].job, error)
                self._leave(row)

    def _choices(self, tokens: np.ndarray, running: np.ndarray) -> dict[int, Callable[[], Choice]]:
        """Runs a step; for each row what chooses from it."""
        decoder = self.model.engine.step_runner(self._cache, len(tokens))
        choosers = {row: state.chooser for row, state in self._rows.items()}
        if all(chooser.takes_likeliest for chooser in choosers.values()):
            likeliest = decoder.step_greedy(tokens, running)
            return {row: partial(_took, chooser, likeliest[row]) for row, chooser in choosers.items()}
        wanted = [chooser.candidates for chooser in choosers.values()]
        if decoder.has_candidates and None not in wanted:
            few = decoder.step_candidates(tokens, running, max(count for count in wanted if count is not None))
            return {row: partial(_chose_among, chooser, *few[row]) for row, chooser in choosers.items()}
        logits = decoder.step(tokens, running)
        return {row: partial(chooser.choose, logits[row]) for row, chooser in choosers.items()}

    def _advance(self, row: int, token: int, logprob: TokenLogprob | None) -> None:
        state = self._rows[row]
        state.token, state.made = token, state.made + 1
        self.counts.new_tokens += 1
        finish = finish_of(self.model.manifest, state.job.options, token, state.made)
        state.job.tell(Piece(state.text.push(token, logprob, finish), logprob))
        if state.text.finish is not None:
            state.job.tell(End(state.text.finish, len(state.job.prompt), state.cached_tokens, state.made))
            self._leave(row)

    def _require_wanted(self, job: Job) -> None:
        if job.cancelled:
            self.counts.cancelled += 1
            raise _CancelledError
        if time.monotonic() > job.deadline:
            raise DeadlineError("The request took longer than this server allows; ask for fewer tokens.")

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, Gemma3nError):
            log.error("a request failed", exc_info=error)
            error = ProviderError("The server failed in this request; its log says why.")
        job.tell(Failure(error))

    def _leave(self, row: int) -> None:
        self._rows.pop(row, None)
        self._cache.truncate(row, 0)


def _took(chooser: Chooser, token: np.int64) -> Choice:
    return chooser.took(int(token)), None


def _chose_among(chooser: Chooser, ids: np.ndarray, logits: np.ndarray) -> Choice:
    return chooser.choose_among(ids, logits), None
