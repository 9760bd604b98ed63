"""Counters in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gemma3n_onnx.runtime.errors import Gemma3nError

from .model_pool import ModelPool

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics(Collector):
    """Reads counts from the pool at each scrape; unloaded models keep their totals."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, pool: ModelPool) -> None:
        self._pool = pool
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._failures = Counter(
            "gemma3n_failures", "Sequences that failed, by error type.", ["kind"], registry=self._registry
        )
        self._first_token = Histogram(
            "gemma3n_first_token_seconds",
            "Time to first token of a sequence.",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def failed(self, error: Gemma3nError) -> None:
        self._failures.labels(type(error).__name__).inc()

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        loaded = [*self._pool.loaded.values()]
        for name, help_, value_of in (
            ("gemma3n_requests_running", "Sequences being generated.", lambda s: s.worker.running),
            ("gemma3n_requests_waiting", "Sequences waiting for a row of the KV cache.", lambda s: s.worker.waiting),
            ("gemma3n_model_bytes", "Estimated memory of a model.", lambda s: s.bytes),
        ):
            gauge = GaugeMetricFamily(name, help_, labels=["model"])
            for served in loaded:
                gauge.add_metric([served.name], value_of(served))
            yield gauge
        counts = self._pool.counts()
        for name, help_ in (
            ("prompt_tokens", "Prompt tokens prefilled."),
            ("cached_tokens", "Prompt tokens reused from earlier prompts."),
            ("new_tokens", "Tokens generated."),
            ("cancelled", "Sequences whose client disconnected."),
        ):
            counter = CounterMetricFamily(f"gemma3n_{name}", help_, labels=["model"])
            for model, totals in counts.items():
                counter.add_metric([model], getattr(totals, name))
            yield counter
