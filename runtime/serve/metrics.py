"""What the server has done, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gemma3n_onnx.runtime.errors import Gemma3nError

from .library import Library

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics(Collector):
    """Counts of the models that are loaded are read when they are asked for; those of a model that was unloaded stay in
    the sums."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, library: Library) -> None:
        self._library = library
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._failures = Counter(
            "gemma3n_failures", "Answers that failed on the way, by kind of error.", ["kind"], registry=self._registry
        )
        self._first_token = Histogram(
            "gemma3n_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def failed(self, error: Gemma3nError) -> None:
        self._failures.labels(type(error).__name__).inc()

    def text(self) -> bytes:
        for served in [*self._library.loaded.values()]:
            waits = served.scheduler.counts.first_token_seconds
            while waits:
                self._first_token.observe(waits.popleft())
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        loaded = [*self._library.loaded.values()]
        for name, help_, of in (
            ("gemma3n_requests_running", "Answers being made.", lambda s: s.scheduler.running),
            ("gemma3n_requests_waiting", "Answers that wait for a row.", lambda s: s.scheduler.waiting),
            ("gemma3n_model_bytes", "Estimated memory of a model.", lambda s: s.bytes),
        ):
            gauge = GaugeMetricFamily(name, help_, labels=["model"])
            for served in loaded:
                gauge.add_metric([served.name], of(served))
            yield gauge
        for name, help_ in (
            ("prompt_tokens", "Tokens of prompts that were run."),
            ("cached_tokens", "Tokens of prompts that were kept from earlier ones."),
            ("new_tokens", "Tokens that were made."),
            ("cancelled", "Answers whose client had gone."),
        ):
            counter = CounterMetricFamily(f"gemma3n_{name}", help_, labels=["model"])
            for served in loaded:
                counter.add_metric([served.name], getattr(served.scheduler.counts, name))
            yield counter
