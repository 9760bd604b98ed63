"""ONNX Runtime: providers, sessions, buffers and IO binding. The only importer of onnxruntime."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .artifact import BYTES_PER_VALUE, Manifest, TensorInfo
from .errors import ArtifactError, OptionError, ProviderError, RuntimeMissingError

MINIMUM_VERSION = (1, 31)
SILENT = 4  # log severity "fatal": what is less comes as an exception, and is told once

NO_PACKING = "session.disable_prepacking"

_ONNX_TYPES = {"fp32": 1, "int64": 7, "fp16": 10, "bf16": 16}


@dataclass(frozen=True)
class Profile:
    """What differs between execution providers.

    `window_slack` is how many rows a windowed cache has beyond its window, as a share of the window: the
    CPU kernel moves its rows once in that many steps, the CUDA kernel wants exactly the window.
    """

    name: str
    provider: str
    device: str
    compute_dtypes: tuple[str, ...]
    window_slack: float
    provider_options: Mapping[str, str] = field(default_factory=dict)
    session_entries: Mapping[str, str] = field(default_factory=dict)


PROFILES = {
    "cpu": Profile(
        name="cpu",
        provider="CPUExecutionProvider",
        device="cpu",
        compute_dtypes=("fp32", "fp16"),
        window_slack=0.25,
        session_entries={
            # Float weights stay in the mapped file; packing would copy each of them into private memory.
            NO_PACKING: "1",
            # Narrow weights are widened once, at load. The default limit leaves a large head to every step.
            "optimization.constant_folding_max_output_size_in_bytes": str(1 << 40),
        },
    ),
    "cuda": Profile(
        name="cuda",
        provider="CUDAExecutionProvider",
        device="cuda",
        compute_dtypes=("fp16", "bf16"),
        window_slack=0.0,
        provider_options={"arena_extend_strategy": "kSameAsRequested"},
    ),
}


def choose_profile(name: str, manifest: Manifest) -> Profile:
    """The profile for `provider=name` and this artifact; "auto" takes CUDA for an artifact made for it.

    Raises:
        OptionError: unknown name.
        RuntimeMissingError: no ONNX Runtime, or one that is too old.
        ProviderError: the provider is not installed, or cannot run the artifact's arithmetic.
    """
    available = _onnxruntime().get_available_providers()
    if name == "auto":
        name = "cuda" if manifest.target == "cuda" and PROFILES["cuda"].provider in available else "cpu"
    if name not in PROFILES:
        raise OptionError(f"Unknown provider {name!r}; choose auto, {' or '.join(PROFILES)}.")
    profile = PROFILES[name]
    if profile.provider not in available:
        raise ProviderError(
            f"This ONNX Runtime has no {profile.provider} (it has {', '.join(available)}); "
            f'install it with: pip install "gemma3n-onnx[{name}]".'
        )
    if manifest.compute_dtype not in profile.compute_dtypes:
        raise ProviderError(
            f"The artifact computes in {manifest.compute_dtype}, which {profile.provider} does not run "
            f"(it runs {', '.join(profile.compute_dtypes)}); export it again with --target {name}."
        )
    return profile


class Buffer:
    """Uninitialised memory on the provider's device, addressed by row (axis 0)."""

    def __init__(self, profile: Profile, shape: tuple[int, ...], dtype: str) -> None:
        self.profile, self.shape, self.dtype = profile, shape, dtype
        ort = _onnxruntime()
        self.nbytes = math.prod(shape) * BYTES_PER_VALUE[dtype]
        try:
            self._value = ort.OrtValue.ortvalue_from_shape_and_type(
                list(shape), _element_type(dtype), profile.device, 0
            )
        except Exception as error:  # the library has no type of its own for this
            raise ProviderError(
                f"{profile.provider} cannot allocate {self.nbytes / 1e9:.2f} GB for a KV cache "
                f"({_first_line(error)}); use a smaller batch, a shorter prompt or fewer max_new_tokens."
            ) from error

    def array(self) -> np.ndarray:
        """The memory itself, of a buffer on the CPU; bf16 as uint16."""
        types: dict[str, Any] = {"fp32": ctypes.c_float, "int64": ctypes.c_int64}
        memory = types.get(self.dtype, ctypes.c_uint16)
        count = math.prod(self.shape)
        whole = (memory * count).from_address(self._value.data_ptr())
        return np.frombuffer(whole, dtype=np.dtype(memory)).reshape(self.shape)

    def address(self, row: int) -> int:
        return self._value.data_ptr() + row * (self.nbytes // self.shape[0])


class Session:
    """One graph, loaded."""

    def __init__(self, path: Path, profile: Profile, threads: int | None = None, *, quantized: bool = False) -> None:
        """`quantized`: the graph's products read quantized weights, which are fast in packed form only."""
        ort = _onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = SILENT
        options.enable_mem_pattern = False
        if threads is not None:
            if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
                raise OptionError(f"threads is {threads!r}; give a positive number of threads.")
            options.intra_op_num_threads = threads
        entries = dict(profile.session_entries)
        if quantized:
            entries.pop(NO_PACKING, None)
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        providers = [(profile.provider, dict(profile.provider_options))]
        try:
            self._session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:
            raise ArtifactError(
                f"ONNX Runtime cannot load {path} ({_first_line(error)}); copy it again or export the artifact again."
            ) from error
        if (active := self._session.get_providers())[0] != profile.provider:
            raise ProviderError(
                f"{profile.provider} did not start and ONNX Runtime fell back to {active[0]}; "
                "check the driver and the CUDA libraries that it needs."
            )
        self.profile = profile
        self.inputs = [_signature(node) for node in self._session.get_inputs()]
        self.outputs = [_signature(node) for node in self._session.get_outputs()]
        self.output_names = [output.name for output in self.outputs]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Host arrays in, host arrays out. ProviderError: the graph fails."""
        try:
            return dict(zip(self.output_names, self._session.run(None, dict(inputs))))
        except Exception as error:
            raise _run_error(error, self.profile) from error

    def bind(self) -> Binding:
        return Binding(self)


class Binding:
    """IO binding of one session. What is bound stays bound from run to run."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._binding = session._session.io_binding()
        self._kept: dict[str, Any] = {}
        ort = _onnxruntime()
        self._options = ort.RunOptions()
        self._options.log_severity_level = SILENT

    def input(self, name: str, array: np.ndarray, dtype: str) -> None:
        """A host array for the next runs; bf16 comes as uint16 bits."""
        ort = _onnxruntime()
        if dtype == "bf16":
            value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ONNX_TYPES[dtype])
        else:
            value = ort.OrtValue.ortvalue_from_numpy(array)
        self._binding.bind_ortvalue_input(name, value)
        self._kept[name] = (array, value)

    def device_buffer(self, past: str, present: str, buffer: Buffer, first_row: int, rows: int) -> None:
        """Rows of `buffer` as an input and as an output: the graph updates them in place."""
        profile = self._session.profile
        shape = [rows, *buffer.shape[1:]]
        place = (profile.device, 0, _element_type(buffer.dtype), shape, buffer.address(first_row))
        self._binding.bind_input(past, *place)
        self._binding.bind_output(present, *place)
        self._kept[past] = buffer

    def output(self, name: str, array: np.ndarray) -> None:
        """A host array that the next runs write to."""
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._kept[name] = array

    def run(self) -> None:
        """ProviderError: the graph fails, for instance for want of memory."""
        try:
            self._session._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            raise _run_error(error, self._session.profile) from error


def _element_type(dtype: str) -> Any:
    numpy_types = {"fp32": np.float32, "fp16": np.float16, "int64": np.int64}
    return numpy_types.get(dtype, _ONNX_TYPES[dtype])


def _onnxruntime() -> Any:
    """The module, imported at first use so that the package itself imports without it."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise RuntimeMissingError(
            f"No {error.name or 'onnxruntime'} is installed; install ONNX Runtime with: "
            'pip install "gemma3n-onnx[cpu]" (or "gemma3n-onnx[cuda]" for an NVIDIA GPU).'
        ) from error
    except ImportError as error:
        raise RuntimeMissingError(
            f"ONNX Runtime is installed but cannot be loaded ({_first_line(error)}); install it again."
        ) from error
    found = str(getattr(onnxruntime, "__version__", ""))  # none: a folder that an uninstallation left behind
    parts = re.match(r"(\d+)\.(\d+)", found)
    if parts is None or tuple(map(int, parts.groups())) < MINIMUM_VERSION:
        wanted = ".".join(map(str, MINIMUM_VERSION))
        raise RuntimeMissingError(
            f"ONNX Runtime {found or 'of an unknown version'} is too old, {wanted} is needed; "
            f'upgrade with: pip install -U "onnxruntime>={wanted}" (or onnxruntime-gpu).'
        )
    return onnxruntime


_DTYPE_NAMES = {
    "tensor(float)": "fp32",
    "tensor(float16)": "fp16",
    "tensor(bfloat16)": "bf16",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


def _signature(node: Any) -> TensorInfo:
    shape = tuple(size if isinstance(size, int) else str(size) for size in node.shape)
    return TensorInfo(node.name, _DTYPE_NAMES.get(node.type, node.type), shape)


def _run_error(error: Exception, profile: Profile) -> ProviderError:
    return ProviderError(
        f"{profile.provider} failed in the graph ({_first_line(error)}); if memory is short, use a smaller batch, "
        "a shorter prompt or a smaller prefill_chunk."
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(".")
