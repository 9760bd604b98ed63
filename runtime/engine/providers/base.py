"""The interface of an execution provider: all that the engine must know of the hardware under it."""

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
    """Which device of a provider's, and how it is used. The CPU ignores all of it.

    memory_limit: bytes, for each session's weights and activations; None is all.
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
    """One of ONNX Runtime's execution providers on one device. A subclass is a file in this folder and an entry of
    `select.PROVIDERS`.

    compute_dtypes: the arithmetic that its kernels have.
    rewrite: makes the bytes of a graph that is loaded in place of a file's; weights stay in the files beside it.
    """

    compute_dtypes: tuple[str, ...]
    device_id: int = 0
    rewrite: Callable[[Path], bytes] | None = None

    name: ClassVar[str]
    """In options, and the extra that installs it."""
    ort_name: ClassVar[str]
    """ONNX Runtime's name of it."""
    device: ClassVar[str]
    """ONNX Runtime's name of its memory."""
    targets: ClassVar[tuple[str, ...]]
    """The exporter's targets that `provider="auto"` runs on it where it is installed."""
    host_memory: ClassVar[bool]
    """Whether its buffers are memory of the host, so that KV caches are copied for prefix reuse, and a prompt can be
    prefilled beside decode steps of other rows even if there are windowed caches."""

    @classmethod
    @abstractmethod
    def create(cls, options: DeviceOptions) -> Self:
        """Raises ProviderError where it cannot start, with the cause and what to do."""

    @property
    def captures_steps(self) -> bool:
        """Whether decode steps are captured and replayed, so that what they are bound to must stay where it is."""
        return False

    def session_config(self, *, quantized: bool) -> Mapping[str, str]:
        """Session configuration entries; `quantized`: the graph's products read quantized weights."""
        return {}

    def provider_options(self, *, captures: bool) -> Mapping[str, str]:
        """Options of the provider; `captures`: the session's runs may be captured."""
        return {}

    @classmethod
    def window_capacity(cls, window: int) -> int:
        """Tokens that the KV cache of a layer with a sliding `window` has room for."""
        return window

    @abstractmethod
    def bind_steps(
        self, binding: Binding, manifest: Manifest, rows: int, capacity: int, candidates: Candidates
    ) -> Steps:
        """Binds inputs and outputs of decode steps of `rows` rows over KV caches of `capacity` tokens, which `binding`
        already holds."""

    def memory_used(self) -> int | None:
        """Bytes in use on the device, by any process; None where the device is the host or does not tell."""
        return None

    @abstractmethod
    def bandwidth(self, threads: int) -> float:
        """Bytes a second that the device's memory gives; NaN where it cannot be measured."""

    def exact(self, rewrite: Callable[[Path], bytes]) -> Self:
        """Itself, loading graphs through `rewrite`, which leaves no bf16 in them, and without reduced precision."""
        return replace(self, rewrite=rewrite, compute_dtypes=(*self.compute_dtypes, "bf16"))

    def require(self, dtype: str, what: str) -> None:
        """Raises ProviderError where the provider lacks the arithmetic `dtype` of a graph."""
        if dtype not in self.compute_dtypes:
            raise ProviderError(
                f"{what} computes in {dtype}, which {self.ort_name} does not run "
                f"(it runs {', '.join(self.compute_dtypes)}); export it again with --target {self.name}."
            )
