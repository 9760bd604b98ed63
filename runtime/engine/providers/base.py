"""The interface of an execution provider: everything that the engine knows about the hardware."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from gemma3n_onnx.runtime.artifact import Manifest
from gemma3n_onnx.runtime.checks import require_integer
from gemma3n_onnx.runtime.engine.candidates import Candidates
from gemma3n_onnx.runtime.engine.ort import Binding
from gemma3n_onnx.runtime.engine.steps import Steps
from gemma3n_onnx.runtime.errors import ProviderError


@dataclass(frozen=True)
class DeviceOptions:
    """Device selection and settings; ignored by the CPU.

    memory_limit: bytes for each session's weights and activations; None is no limit.
    graphs: whether a decode step is captured once and then replayed.
    """

    id: int = 0
    memory_limit: int | None = None
    graphs: bool = True

    def __post_init__(self) -> None:
        require_integer("device_id", self.id, 0)
        if self.memory_limit is not None:
            require_integer("gpu_memory_limit", self.memory_limit, 1)


@dataclass(frozen=True)
class ExecutionProvider(ABC):
    """An ONNX Runtime execution provider on one device. Each subclass has a file in this folder and an entry in
    `select.BUILT_IN`.

    compute_dtypes: the dtypes that its kernels support.
    rewrite: converts a graph file to the graph bytes to load instead; weights stay in their files.
    """

    compute_dtypes: tuple[str, ...]
    device_id: int = 0
    rewrite: Callable[[Path], bytes] | None = None

    name: ClassVar[str]
    """The name in options, and of the extra that installs it."""
    ort_name: ClassVar[str]
    """ONNX Runtime's name of the provider."""
    device: ClassVar[str]
    """ONNX Runtime's name of the device."""
    targets: ClassVar[tuple[str, ...]]
    """The export targets that `provider="auto"` runs on it if it is installed."""
    host_memory: ClassVar[bool]
    """Whether its buffers are in host memory. KV caches are then copied for prefix reuse, and prefill can interleave
    with decode steps of other rows even if there are windowed caches."""

    @classmethod
    @abstractmethod
    def create(cls, options: DeviceOptions) -> Self:
        """Raises ProviderError, with the cause and what to do, if it cannot start."""

    @property
    def captures_steps(self) -> bool:
        """Whether decode steps are captured and replayed, so that bound memory must not move."""
        return False

    def session_config(self, *, quantized: bool) -> Mapping[str, str]:
        """Session configuration entries; `quantized`: the graph's products read quantized weights."""
        return {}

    def provider_options(self, *, captures: bool) -> Mapping[str, str]:
        """Options of the provider; `captures`: the session's runs may be captured."""
        return {}

    @classmethod
    def window_capacity(cls, window: int) -> int:
        """Capacity in tokens of the KV cache of a layer with a sliding `window`."""
        return window

    @abstractmethod
    def bind_steps(
        self, binding: Binding, manifest: Manifest, rows: int, capacity: int, candidates: Candidates
    ) -> Steps:
        """Binds inputs and outputs of decode steps of `rows` rows; KV caches of `capacity` tokens are bound already."""

    def memory_used(self) -> int | None:
        """Bytes in use on the device, by any process; None on the host, or if unknown."""
        return None

    @abstractmethod
    def bandwidth(self, threads: int) -> float:
        """Memory bandwidth of the device in bytes per second; NaN if it cannot be measured."""

    def exact(self, rewrite: Callable[[Path], bytes]) -> Self:
        """A copy that loads graphs through `rewrite`, which removes bf16, and does not use reduced precision."""
        return replace(self, rewrite=rewrite, compute_dtypes=(*self.compute_dtypes, "bf16"))

    def require(self, dtype: str, what: str) -> None:
        """Raises ProviderError if the provider does not support a graph's compute dtype."""
        if dtype not in self.compute_dtypes:
            raise ProviderError(
                f"{what} computes in {dtype}, which {self.ort_name} does not support "
                f"(it supports {', '.join(self.compute_dtypes)}); export it again with --target {self.name}."
            )
