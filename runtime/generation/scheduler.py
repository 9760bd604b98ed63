"""Continuous batching: the one loop that prefills prompts, runs decode steps and samples tokens.

A request joins the running batch when a row of the KV cache is free, and leaves when it ends. `generate`, `stream`,
`chat` and the server call it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field, replace

import numpy as np

from gemma3n_onnx.runtime.engine.engine import Engine
from gemma3n_onnx.runtime.engine.kv_cache import KVCache
from gemma3n_onnx.runtime.engine.prefix_cache import WORTH_SHARING, PrefixCache
from gemma3n_onnx.runtime.errors import ContextLengthError, DeadlineError
from gemma3n_onnx.runtime.tokens import PromptTokens, shared_prefix

from .detokenizer import TokenDecoder
from .likelihood import token_logprobs
from .logprobs import TokenLogprob
from .options import GenerationOptions
from .result import RowTimings
from .sampler import SamplerState
from .text import TextAssembler

log = logging.getLogger(__name__)

# How often requests that arrive are looked for while there is nothing to do but to encode an image or a clip.
POLL_SECONDS = 0.01


@dataclass(frozen=True)
class PromptEvent:
    """Log-probabilities of a prompt's tokens, from the second on."""

    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class TokenEvent:
    """One token: the text that it completes, which may be empty, and its log-probability if requested."""

    token_id: int
    text: str
    logprob: TokenLogprob | None


@dataclass(frozen=True)
class FinishEvent:
    """`reason` is "stop" or "length"; `cached_tokens` of the prompt were reused from an earlier prompt. `stop_string`
    ended the text."""

    reason: str
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    timings: RowTimings = field(default_factory=RowTimings, compare=False)
    stop_string: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the answer ended by itself: neither its length nor a stop string cut it."""
        return self.reason == "stop" and self.stop_string is None


@dataclass(frozen=True)
class FailureEvent:
    error: Exception


Event = PromptEvent | TokenEvent | FinishEvent | FailureEvent


@dataclass(eq=False)
class Request:
    """One sequence to generate.

    The scheduler calls `on_event` for each token, then with a FinishEvent or a FailureEvent; never after `cancel`.
    `sample` numbers the continuations of one prompt. `deadline` is a time of `time.monotonic`.

    With `prompt_logprobs`, the first event is a PromptEvent, whose positions list so many of the most likely tokens.
    Unless it `generates`, the request ends before a token.
    """

    prompt: PromptTokens
    options: GenerationOptions
    on_event: Callable[[Event], None]
    sample: int = 0
    deadline: float = float("inf")
    prompt_logprobs: int | None = None
    generates: bool = True
    submitted: float = field(default_factory=time.monotonic)
    timings: RowTimings = field(default_factory=RowTimings)
    cancelled: bool = False

    @property
    def most_tokens(self) -> int:
        """The most tokens of its answer."""
        return self.options.max_new_tokens if self.generates else 0

    def cancel(self) -> None:
        """May be called from any thread; the row is free after the scheduler's next step."""
        self.cancelled = True


@dataclass
class Counts:
    """Totals of a scheduler: tokens prefilled, reused and generated, and requests that were cancelled."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    cancelled: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__})


@dataclass
class _Row:
    """A running request: its sampler, its text, and the tokens generated so far."""

    request: Request
    sampler: SamplerState
    text: TextAssembler
    new_ids: list[int] = field(default_factory=list)

    @property
    def keys(self) -> list[Hashable]:
        return [*self.request.prompt.keys(), *self.new_ids]


class _CancelledError(Exception):
    pass


class Scheduler:
    """Runs up to `rows` requests at once, each of at most `capacity` tokens, answer included. Not thread-safe, except
    for `Request.cancel`.

    A prompt reuses the prefix that it shares with a `prefix_cache` entry. Without that cache, if prompts are prefilled
    in place, it reuses the prefix that it shares with the row that it joins.

    With `interleave`, the other rows run a decode step between two chunks of a prompt, and while `executor` runs the
    image or audio encoder for the first prompt that needs it; prompts without media do not wait for that. A decode step
    also computes the idle rows below the last running one, which moves their windowed caches. In host memory, the
    prompt is therefore prefilled into a separate cache; in device memory, the other rows wait if there are windowed
    caches.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: TokenDecoder,
        rows: int,
        capacity: int,
        *,
        prefix_cache: PrefixCache | None = None,
        interleave: bool = False,
        executor: Executor | None = None,
    ) -> None:
        self._engine, self._tokenizer, self.capacity = engine, tokenizer, capacity
        self._cache = engine.new_cache(rows, capacity)
        self._executor = executor
        self._stages = interleave and engine.provider.host_memory
        self._overlaps = interleave and (self._stages or not self._cache.has_windows)
        copies = engine.provider.host_memory and (self._stages or rows == 1)
        self._prefix_cache = prefix_cache if copies else None
        self._reuses_rows = not self._stages and self._prefix_cache is None
        self._cache_is_entry = False
        """Whether the prefix cache holds `_cache` itself, which other prompts must then not overwrite."""
        self._held: list[list[Hashable]] = [[] for _ in range(rows)]
        """Keys of the tokens that the row of each finished request still holds."""
        self._running: dict[int, _Row] = {}
        self._prefilling: int | None = None
        self._waiting: deque[Request] = deque()
        self._encoding: tuple[Request, Future[PromptTokens]] | None = None
        """A waiting request, and its prompt with the images and clips that are not cached encoded."""
        self.counts = Counts()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(self, request: Request) -> None:
        """Raises ContextLengthError if prompt and new tokens do not fit into a row."""
        check_context(self.capacity, len(request.prompt), request.most_tokens)
        self._waiting.append(request)

    def advance(self) -> bool:
        """Prefills the first waiting request that is ready if a row is free, else runs a decode step; False when
        nothing is left."""
        if self._executor is not None and self._overlaps:
            self._encode_first(self._executor)
        ready = self._first_ready() if len(self._running) < self._cache.rows else None
        if ready is not None:
            self._waiting.remove(ready)
            self._admit(ready)
        elif self._running:
            self._step()
        elif self._encoding is not None:
            wait([self._encoding[1]], POLL_SECONDS)
        return bool(self._waiting or self._running)

    def abort(self, error: Exception) -> None:
        """Fails every running and waiting request."""
        requests = [*(row.request for row in self._running.values()), *self._waiting]
        self._running.clear()
        self._waiting.clear()
        if self._encoding is not None:
            self._encoding[1].cancel()
            self._encoding = None
        for request in requests:
            self._fail(request, error)

    def _encode_first(self, executor: Executor) -> None:
        """Encodes the first waiting prompt with media; drops it when it is no longer wanted."""
        if self._encoding is not None:
            request, encoding = self._encoding
            try:
                self._require_wanted(request)
                return
            except _CancelledError:
                pass
            except DeadlineError as error:
                self._fail(request, error)
            encoding.cancel()
            self._encoding = None
            self._waiting.remove(request)
        first = next((each for each in self._waiting if not each.prompt.is_encoded), None)
        if first is not None:
            self._encoding = first, executor.submit(_encoded, first, self._cached(first))

    def _first_ready(self) -> Request | None:
        """The first waiting request that need not wait for an encoder."""
        if self._executor is None or not self._overlaps:
            return self._waiting[0] if self._waiting else None
        encoded = self._encoding[0] if self._encoding is not None and self._encoding[1].done() else None
        return next((each for each in self._waiting if each is encoded or each.prompt.is_encoded), None)

    def _take_encoded(self, request: Request) -> None:
        """Raises what its encoder raised."""
        if self._encoding is not None and self._encoding[0] is request:
            encoding, self._encoding = self._encoding[1], None
            request.prompt = encoding.result()

    def _cached(self, request: Request) -> int:
        """How many tokens of a prompt need not be prefilled."""
        keys = request.prompt.keys()
        if request.prompt_logprobs is not None:
            return 0
        if self._prefix_cache is not None:
            return self._prefix_cache.usable(keys)
        return max(shared_prefix(held, keys[:-1]) for held in self._held) if self._reuses_rows else 0

    def _admit(self, request: Request) -> None:
        try:
            self._take_encoded(request)
            self._require_wanted(request)
            sampler = SamplerState(request.options, request.prompt.ids, request.sample)
            if request.prompt_logprobs is not None and self._score(request, request.prompt_logprobs, sampler):
                return
            if not request.generates:
                _emit(request, FinishEvent("length", len(request.prompt), 0, 0, request.timings))
                return
        except _CancelledError:
            return
        except Exception as error:
            self._fail(request, error)
            return
        keys = request.prompt.keys()
        row = self._prefilling = self._free_row(keys)
        self._prepare(row, keys)
        try:
            logits = self._prefill(row, keys, request)
            self._running[row] = _Row(request, sampler, TextAssembler(self._tokenizer, request.options.stop))
            self._push(row, *sampler.sample(logits))
        except _CancelledError:
            self._leave(row, keys)
        except Exception as error:
            self._forget(row)
            self._fail(request, error)
        except BaseException:
            self._leave(row, keys)
            raise
        finally:
            self._prefilling = None

    def _score(self, request: Request, top: int, sampler: SamplerState) -> bool:
        """Emits the log-probabilities of a prompt, and the only token of a greedy answer; True if that ends the
        request. The other rows continue."""
        started = time.perf_counter()
        request.prompt = prompt = self._encode(request.prompt, request)
        encoded = time.perf_counter()

        def after_chunk(_: int) -> None:
            self._require_wanted(request)
            if self._overlaps and self._running:
                self._step()

        one_more = request.most_tokens == 1 and sampler.takes_argmax
        scores = self._engine.score(prompt, 1, and_next=one_more, after_chunk=after_chunk)
        timings = request.timings
        timings.prefill_tokens = len(prompt)
        timings.encoder_seconds += encoded - started
        timings.prefill_seconds = time.perf_counter() - encoded
        _emit(request, PromptEvent(token_logprobs(prompt.ids[1:], scores, top)))
        if one_more:
            token = int(scores.top_ids[-1, 0])
            wanted = request.options.logprobs
            (logprob,) = token_logprobs([token], scores.last(), wanted or 0)
            state = _Row(request, sampler, TextAssembler(self._tokenizer, request.options.stop))
            for event in self._events(state, token, None if wanted is None else logprob):
                _emit(request, event)
        if one_more or not request.generates:
            self.counts.prompt_tokens += len(prompt)
        return one_more

    def _free_row(self, keys: list[Hashable]) -> int:
        """The free row with a prefix worth reusing; else the first empty row, else the first free one.

        Low rows first, because a step computes all rows up to the last running one.
        """
        free = [row for row in range(self._cache.rows) if row not in self._running]
        if not self._reuses_rows:
            return free[0]
        shared = {row: shared_prefix(self._held[row], keys) for row in free}
        best = max(free, key=lambda row: shared[row])
        return best if shared[best] >= WORTH_SHARING else min(free, key=lambda row: (bool(self._held[row]), row))

    def _prepare(self, row: int, keys: list[Hashable]) -> None:
        """Cuts a row to the prefix that it shares with a prompt, except the prompt's last token, or empties it."""
        shared = shared_prefix(self._held[row], keys[:-1]) if self._reuses_rows else 0
        self._held[row] = keys[:shared]
        if not self._cache.truncate(row, shared):
            self._forget(row)

    def _prefill(self, row: int, keys: list[Hashable], request: Request) -> np.ndarray:
        """Runs the prompt into `row`; logits [V] after its last token."""
        started = time.perf_counter()
        entry = None
        cache, place = self._prompt_cache(len(keys)), 0 if self._stages else row
        if self._prefix_cache is not None:
            entry = self._prefix_cache.begin(keys, cache)
        cached = int(cache.lengths[place])
        copied = time.perf_counter()
        rest = self._encode(request.prompt.after(cached), request)
        encoded = time.perf_counter()

        def after_chunk(_: int) -> None:
            self._require_wanted(request)
            if self._overlaps and self._running:
                self._step()

        if self._prefix_cache is not None and entry is not None:
            logits = self._prefix_cache.run(self._engine, entry, rest, after_chunk)
        else:
            logits = self._engine.prefill(cache, place, rest.ids, rest.spans, after_chunk)
        if self._stages:
            self._cache.fill_row(row, cache)
        timings = request.timings
        timings.cached_tokens, timings.prefill_tokens = cached, len(rest)
        timings.encoder_seconds += encoded - copied
        timings.prefill_seconds = time.perf_counter() - encoded + copied - started
        self.counts.prompt_tokens += len(rest)
        self.counts.cached_tokens += cached
        return logits

    def _prompt_cache(self, tokens: int) -> KVCache:
        """The cache to prefill a prompt of `tokens` into: a separate one, to be copied into a row, or the rows'
        own."""
        if self._stages:
            return self._engine.new_cache(1, tokens)
        if self._prefix_cache is not None:
            if self._cache_is_entry:
                self._cache = self._engine.new_cache(1, self.capacity)
            self._cache_is_entry = True
        return self._cache

    def _encode(self, prompt: PromptTokens, request: Request) -> PromptTokens:
        """Runs the encoders of images and clips that are neither encoded nor cached any more, while the other rows
        continue."""
        if self._executor is None or not self._overlaps or prompt.is_encoded:
            return prompt.encoded()
        encoding = self._executor.submit(prompt.encoded)
        try:
            while self._running and not encoding.done():
                self._require_wanted(request)
                self._step()
            return encoding.result()
        finally:
            encoding.cancel()

    def _step(self) -> None:
        """Generates one more token for every running row."""
        for row, state in [*self._running.items()]:
            try:
                self._require_wanted(state.request)
            except _CancelledError:
                self._leave(row, state.keys)
            except DeadlineError as error:
                self._leave(row, state.keys)
                self._fail(state.request, error)
        if not self._running:
            return
        count = max(self._running) + 1
        tokens = np.full(count, self._engine.manifest.pad_token_id, dtype=np.int64)
        active = np.zeros(count, dtype=bool)
        for row in range(count):
            if row in self._running:
                tokens[row], active[row] = self._running[row].new_ids[-1], True
            elif row != self._prefilling or self._stages:
                self._forget(row)
        started = time.perf_counter()
        try:
            choose = self._run_step(tokens, active)
        except Exception as error:
            for row, state in [*self._running.items()]:
                self._forget(row)
                self._fail(state.request, error)
            return
        seconds = time.perf_counter() - started
        for row, state in [*self._running.items()]:
            state.request.timings.decode_tokens += 1
            state.request.timings.decode_seconds += seconds
            try:
                self._push(row, *choose(row))
            except Exception as error:
                self._leave(row, state.keys)
                self._fail(state.request, error)

    def _run_step(self, tokens: np.ndarray, active: np.ndarray) -> Callable[[int], tuple[int, TokenLogprob | None]]:
        """Runs tokens [B] of the active rows [B]; returns the function that samples the next token of a row. Copies
        only what the samplers need to the host: the argmax, a few candidates, or all logits."""
        runner = self._engine.step_runner(self._cache, len(tokens))
        samplers = {row: state.sampler for row, state in self._running.items()}
        if all(sampler.is_greedy for sampler in samplers.values()):
            greedy = runner.step_greedy(tokens, active)
            return lambda row: (samplers[row].accept(int(greedy[row])), None)
        counts = [sampler.candidates for sampler in samplers.values()]
        if runner.has_candidates and None not in counts:
            candidates = runner.step_candidates(tokens, active, max(count for count in counts if count is not None))
            return lambda row: (samplers[row].sample_candidates(*candidates[row]), None)
        logits = runner.step(tokens, active)
        return lambda row: samplers[row].sample(logits[row])

    def _push(self, row: int, token: int, logprob: TokenLogprob | None) -> None:
        """Emits a sampled token, and ends its request if it is the last."""
        state = self._running[row]
        events = self._events(state, token, logprob)
        if len(events) > 1:
            self._leave(row, state.keys)
        for event in events:
            _emit(state.request, event)

    def _events(self, state: _Row, token: int, logprob: TokenLogprob | None) -> list[Event]:
        """The event of a sampled token, and a FinishEvent if it is the last."""
        request = state.request
        state.new_ids.append(token)
        self.counts.new_tokens += 1
        reason = self._finish_reason(state, token)
        text, reason = state.text.push(None if token in request.options.stop_token_ids else token, reason)
        if len(state.new_ids) == 1:
            request.timings.time_to_first_token = time.monotonic() - request.submitted
        events: list[Event] = [TokenEvent(token, text, logprob)]
        if reason is not None:
            timings, matched = request.timings, state.text.stop_string
            counts = len(request.prompt), timings.cached_tokens, len(state.new_ids)
            events.append(FinishEvent(reason, *counts, timings, matched))
        return events

    def _finish_reason(self, state: _Row, token: int) -> str | None:
        end_ids = (*self._engine.manifest.eos_token_ids, *state.request.options.stop_token_ids)
        if token in end_ids:
            return "stop"
        return "length" if len(state.new_ids) == state.request.options.max_new_tokens else None

    def _require_wanted(self, request: Request) -> None:
        if request.cancelled:
            self.counts.cancelled += 1
            raise _CancelledError
        if time.monotonic() > request.deadline:
            raise DeadlineError("The request took longer than this server allows; request fewer tokens.")

    def _fail(self, request: Request, error: Exception) -> None:
        _emit(request, FailureEvent(error))

    def _leave(self, row: int, keys: list[Hashable]) -> None:
        """Frees a row, which keeps its tokens of these `keys` until a step computes it while it is idle."""
        self._running.pop(row, None)
        self._held[row] = keys[: int(self._cache.lengths[row])]

    def _forget(self, row: int) -> None:
        """Frees and empties a row."""
        self._running.pop(row, None)
        self._held[row] = []
        self._cache.truncate(row, 0)


def _encoded(request: Request, cached: int) -> PromptTokens:
    """The prompt with every span encoded that is not within its first `cached` tokens."""
    started, spans = time.perf_counter(), []
    for span in request.prompt.spans:
        if request.cancelled:
            raise _CancelledError
        spans.append(span.encoded() if span.stop > cached else span)
    request.timings.encoder_seconds = time.perf_counter() - started
    return replace(request.prompt, spans=tuple(spans))


def _emit(request: Request, event: Event) -> None:
    """A callback that fails cancels its request."""
    if request.cancelled:
        return
    try:
        request.on_event(event)
    except Exception:
        log.exception("an on_event callback failed")
        request.cancel()


def check_context(capacity: int, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raises ContextLengthError if prompt and answer together may exceed `capacity` tokens."""
    if prompt_tokens > capacity and max_new_tokens == 0:
        raise ContextLengthError(
            f"The text has {prompt_tokens:,} tokens, which is more than the context of {capacity:,}; shorten it."
        )
    if prompt_tokens + max_new_tokens > capacity:
        raise ContextLengthError(
            f"The prompt has {prompt_tokens:,} tokens and max_new_tokens is {max_new_tokens:,}, which is more "
            f"than the context of {capacity:,}; shorten the prompt or lower max_new_tokens.",
            option="max_new_tokens",
        )
