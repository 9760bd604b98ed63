"""A third execution provider: ONNX Runtime's CPU kernels, treated as a device with memory of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from gemma3n_onnx.runtime.artifact import Manifest
from gemma3n_onnx.runtime.engine.candidates import Candidates
from gemma3n_onnx.runtime.engine.ort import Binding
from gemma3n_onnx.runtime.engine.providers.base import DeviceOptions, ExecutionProvider
from gemma3n_onnx.runtime.engine.steps import DeviceSteps, Steps
from gemma3n_onnx.runtime.errors import ProviderError


@dataclass(frozen=True)
class FakeProvider(ExecutionProvider):
    compute_dtypes: tuple[str, ...] = ("fp32",)

    name: ClassVar[str] = "fake"
    ort_name: ClassVar[str] = "CPUExecutionProvider"
    device: ClassVar[str] = "cpu"
    targets: ClassVar[tuple[str, ...]] = ("fake",)
    host_memory: ClassVar[bool] = False

    @classmethod
    def create(cls, options: DeviceOptions) -> Self:
        if options.id > 3:
            raise ProviderError(f"{cls.ort_name} cannot start: there is no device {options.id}.")
        return cls(device_id=0)

    @classmethod
    def window_capacity(cls, window: int) -> int:
        return 2 * window

    def bind_steps(
        self, binding: Binding, manifest: Manifest, rows: int, capacity: int, candidates: Candidates
    ) -> Steps:
        return DeviceSteps(binding, manifest, rows, candidates)

    def memory_used(self) -> int | None:
        return 123_000_000

    def bandwidth(self, threads: int) -> float:
        return 7e9
