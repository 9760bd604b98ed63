"""The thread that runs a model's scheduler."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from gemma3n_onnx.runtime.engine.prefix_cache import PrefixCache
from gemma3n_onnx.runtime.errors import Gemma3nError, OptionError, ProviderError
from gemma3n_onnx.runtime.generation.scheduler import Counts, Request, Scheduler, check_context
from gemma3n_onnx.runtime.model import OnnxGemma3n

log = logging.getLogger(__name__)


class BusyError(Gemma3nError, RuntimeError):
    """The queue is full, or every model in memory is in use."""


class ShutdownError(Gemma3nError, RuntimeError):
    """The server ends before the answer does."""

    def __init__(self) -> None:
        super().__init__("The server is shutting down; send the request again.")


class ModelWorker:
    """Generates `rows` sequences at once, each of up to `context` tokens with its prompt; `queue` more may wait."""

    def __init__(self, model: OnnxGemma3n, rows: int, context: int, queue: int, prefixes: int) -> None:
        self.context, self._rows, self._queue_limit = context, rows, queue
        self._encoders = ThreadPoolExecutor(1, thread_name_prefix="encoders")
        # While CUDA captures a step, no other thread may allocate device memory.
        beside_steps = None if model.engine.provider.captures_steps else self._encoders
        self._scheduler = Scheduler(
            model.engine,
            model.tokenizer,
            rows,
            context,
            prefix_cache=PrefixCache(prefixes) if prefixes else None,
            interleave=True,
            executor=beside_steps,
        )
        self._submitted: deque[Request] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._end: Exception
        """Why requests fail once it is closed."""
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._submitted) + self._scheduler.waiting

    @property
    def running(self) -> int:
        return self._scheduler.running

    @property
    def counts(self) -> Counts:
        return self._scheduler.counts

    def submit(self, requests: Sequence[Request]) -> None:
        """Submits all of the requests or none.

        Raises:
            OptionError: more requests than the queue ever takes. BusyError: the queue is full. ContextLengthError: a
            request does not fit into a row.
        """
        for request in requests:
            check_context(self.context, len(request.prompt), request.most_tokens)
        self.require_capacity(len(requests))
        with self._changed:
            free = self._rows - self.running
            if self._closed or self.waiting + len(requests) > free + self._queue_limit:
                raise BusyError("The queue of this model is full; try again later.")
            self._submitted.extend(requests)
            self._changed.notify()

    def require_capacity(self, count: int) -> None:
        """Raises OptionError if the queue never takes so many requests at once."""
        if count > (most := self._rows + self._queue_limit):
            raise OptionError(
                f"The request asks for {count} answers, but this server takes at most {most} at once; split it."
            )

    def close(self, end: Gemma3nError) -> None:
        """Stops the thread; running and waiting requests fail with `end`."""
        with self._changed:
            self._closed, self._end = True, end
            self._changed.notify()
        self._thread.join()
        self._encoders.shutdown()

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            self._end = error
        with self._changed:
            self._closed = True
            while self._submitted:
                self._scheduler.submit(self._submitted.popleft())
        self._scheduler.abort(self._end)

    def _serve(self) -> None:
        busy = False
        while True:
            with self._changed:
                while not (busy or self._closed or self._submitted):
                    self._changed.wait()
                if self._closed:
                    return
                while self._submitted:
                    self._scheduler.submit(self._submitted.popleft())
            busy = self._scheduler.advance()


def to_gemma3n_error(error: Exception) -> Gemma3nError:
    """The error to show to the client; unexpected errors are logged and hidden."""
    if isinstance(error, Gemma3nError):
        return error
    log.error("a request failed", exc_info=error)
    return ProviderError("The server failed on this request; see its log.")
