"""The CPU execution provider."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from gemma3n_onnx.runtime.artifact import Manifest, cpu_session_config
from gemma3n_onnx.runtime.engine.candidates import Candidates
from gemma3n_onnx.runtime.engine.ort import Binding
from gemma3n_onnx.runtime.engine.steps import HostSteps, Steps

from .base import DeviceOptions, ExecutionProvider

_WINDOW_SLACK = 0.25  # spare capacity, as a share of the window: the kernel moves a cache when it is full


@dataclass(frozen=True)
class CPUProvider(ExecutionProvider):
    compute_dtypes: tuple[str, ...] = ("fp32", "fp16")

    name: ClassVar[str] = "cpu"
    ort_name: ClassVar[str] = "CPUExecutionProvider"
    device: ClassVar[str] = "cpu"
    targets: ClassVar[tuple[str, ...]] = ("cpu",)
    host_memory: ClassVar[bool] = True

    @classmethod
    def create(cls, options: DeviceOptions) -> Self:
        return cls()

    def session_config(self, *, quantized: bool) -> Mapping[str, str]:
        return cpu_session_config(quantized)

    @classmethod
    def window_capacity(cls, window: int) -> int:
        return window + int(window * _WINDOW_SLACK)

    def bind_steps(
        self, binding: Binding, manifest: Manifest, rows: int, capacity: int, candidates: Candidates
    ) -> Steps:
        return HostSteps(binding, manifest, rows)

    def bandwidth(self, threads: int) -> float:
        """Read bandwidth of main memory in bytes per second, with `threads` threads."""
        parts = [np.ones(1 << 26, dtype=np.float32) for _ in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            best = min(_seconds(lambda: list(pool.map(np.max, parts))) for _ in range(5))
        return sum(part.nbytes for part in parts) / best


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
