"""ONNX Runtime: providers, sessions, buffers and IO binding. The only importer of onnxruntime."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gemma3n_onnx.runtime.artifact import BYTES_PER_VALUE, Manifest, TensorInfo
from gemma3n_onnx.runtime.errors import ArtifactError, OptionError, ProviderError, RuntimeMissingError

from . import cuda

MINIMUM_VERSION = (1, 31)
SILENT = 4  # log severity "fatal": what is less comes as an exception, and is told once

NO_PACKING = "session.disable_prepacking"

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"  # of a graph that comes as bytes
_CAPTURE = "gpu_graph_id"
_NO_CAPTURE = "-1"

_ONNX_TYPES = {"fp32": 1, "int64": 7, "fp16": 10, "bf16": 16}


@dataclass(frozen=True)
class Profile:
    """What differs between execution providers.

    `window_slack` is how many rows a windowed cache has beyond its window, as a share of the window: the
    CPU kernel moves its rows once in that many steps, the CUDA kernel wants exactly the window. `captures`: a decode
    step is recorded once and then replayed, so that what it is bound to stays where it is. `rewritten` makes another
    graph of a file's, which is loaded in its place; weights stay in the files beside it.
    """

    name: str
    provider: str
    device: str
    compute_dtypes: tuple[str, ...]
    window_slack: float
    device_id: int = 0
    captures: bool = False
    provider_options: Mapping[str, str] = field(default_factory=dict)
    session_entries: Mapping[str, str] = field(default_factory=dict)
    rewritten: Callable[[Path], bytes] | None = None


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
        captures=True,
        provider_options={"arena_extend_strategy": "kSameAsRequested"},
    ),
}


@dataclass(frozen=True)
class Device:
    """Which GPU, and how much of its memory ONNX Runtime may take; nothing of it counts on the CPU.

    memory_limit: bytes, for each session's weights and activations; None is all.
    graphs: whether a decode step is captured as a CUDA graph and replayed.
    """

    id: int = 0
    memory_limit: int | None = None
    graphs: bool = True

    def __post_init__(self) -> None:
        if not _is_whole(self.id) or self.id < 0:
            raise OptionError(f"device_id is {self.id!r}; give the number of a GPU, 0 for the first.")
        if self.memory_limit is not None and (not _is_whole(self.memory_limit) or self.memory_limit < 1):
            raise OptionError(f"gpu_memory_limit is {self.memory_limit!r}; give a positive number of bytes.")


def choose_profile(name: str, manifest: Manifest, device: Device | None = None) -> Profile:
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
    check_compute_dtype(profile, manifest.compute_dtype, "The artifact")
    return profile if profile.device == "cpu" else _on_device(profile, device or Device())


def check_compute_dtype(profile: Profile, dtype: str, what: str) -> None:
    """Raises ProviderError where the provider lacks the arithmetic of a graph."""
    if dtype not in profile.compute_dtypes:
        raise ProviderError(
            f"{what} computes in {dtype}, which {profile.provider} does not run "
            f"(it runs {', '.join(profile.compute_dtypes)}); export it again with --target {profile.name}."
        )


def _on_device(profile: Profile, device: Device) -> Profile:
    if (trouble := cuda.trouble(_onnxruntime(), device.id)) is not None:
        raise ProviderError(f"{profile.provider} cannot start: {trouble}.")
    options = {**profile.provider_options, "device_id": str(device.id)}
    if device.memory_limit is not None:
        options["gpu_mem_limit"] = str(device.memory_limit)
    return replace(profile, device_id=device.id, captures=device.graphs, provider_options=options)


class Buffer:
    """Uninitialised memory on the provider's device, addressed by row (axis 0)."""

    def __init__(self, profile: Profile, shape: tuple[int, ...], dtype: str) -> None:
        self.profile, self.shape, self.dtype = profile, shape, dtype
        ort = _onnxruntime()
        self.nbytes = math.prod(shape) * BYTES_PER_VALUE[dtype]
        try:
            self._value = ort.OrtValue.ortvalue_from_shape_and_type(
                list(shape), _element_type(dtype), profile.device, profile.device_id
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

    def fill(self, array: np.ndarray) -> None:
        """Copies a host array of its shape to it; bf16 comes as uint16 bits."""
        assert array.shape == self.shape, f"{array.shape} instead of {self.shape}"
        self._value.update_inplace(np.ascontiguousarray(array))

    def to_host(self) -> np.ndarray:
        """A copy of what it holds, fp32 or int64."""
        return self._value.numpy()


class Session:
    """One graph, loaded."""

    def __init__(
        self,
        path: Path,
        profile: Profile,
        threads: int | None = None,
        *,
        quantized: bool = False,
        captures: bool = False,
    ) -> None:
        """`quantized`: the graph's products read quantized weights, which are fast in packed form only.
        `captures`: runs of a binding that asks for it are recorded and replayed."""
        ort = _onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = SILENT
        options.enable_mem_pattern = False
        if threads is not None:
            if not _is_whole(threads) or threads < 1:
                raise OptionError(f"threads is {threads!r}; give a positive number of threads.")
            options.intra_op_num_threads = threads
        entries = dict(profile.session_entries)
        if quantized:
            entries.pop(NO_PACKING, None)
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        provider_options = dict(profile.provider_options)
        if captures:
            provider_options["enable_cuda_graph"] = "1"
        providers = [(profile.provider, provider_options)]
        graph: str | bytes = str(path)
        if profile.rewritten is not None:
            graph = profile.rewritten(path)
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(path.parent))
        try:
            self._session = ort.InferenceSession(graph, options, providers=providers, enable_fallback=0)
        except Exception as error:
            raise ArtifactError(
                f"ONNX Runtime cannot load {path} ({_first_line(error)}); copy it again or export the artifact again."
            ) from error
        if (active := self._session.get_providers())[0] != profile.provider:
            raise ProviderError(
                f"{profile.provider} did not start and ONNX Runtime fell back to {active[0]}; "
                "check that cuDNN 9 is there and that other programs leave some of the GPU's memory."
            )
        self.profile, self._captures = profile, captures
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
        self._fixed: dict[str, Buffer] = {}
        self._options = _run_options(_NO_CAPTURE if session._captures else None)

    def capture(self, number: int) -> None:
        """The next run is recorded, those after it replay it. Everything has to be bound to memory of the device by
        then, and stay where it is. No other binding of the session has this `number`, from 1."""
        self._options = _run_options(str(number))

    def fix_input(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        """Has `input` copy what it is given to one place on the device."""
        buffer = Buffer(self._session.profile, shape, dtype)
        self._binding.bind_ortvalue_input(name, buffer._value)
        self._fixed[name] = buffer

    def device_input(self, name: str, buffer: Buffer) -> None:
        self._binding.bind_ortvalue_input(name, buffer._value)
        self._kept[name] = buffer

    def input(self, name: str, array: np.ndarray, dtype: str) -> None:
        """A host array for the next runs; bf16 comes as uint16 bits."""
        if (fixed := self._fixed.get(name)) is not None:
            fixed.fill(array)
            return
        value = _value_of(array, dtype)
        self._binding.bind_ortvalue_input(name, value)
        self._kept[name] = (array, value)

    def device_buffer(self, past: str, present: str, buffer: Buffer, first_row: int, rows: int) -> None:
        """Rows of `buffer` as an input and as an output: the graph updates them in place."""
        profile = self._session.profile
        shape = [rows, *buffer.shape[1:]]
        place = (profile.device, profile.device_id, _element_type(buffer.dtype), shape, buffer.address(first_row))
        self._binding.bind_input(past, *place)
        self._binding.bind_output(present, *place)
        self._kept[past] = buffer

    def device_output(self, name: str, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Memory on the device that the next runs write to."""
        buffer = Buffer(self._session.profile, shape, dtype)
        self._binding.bind_ortvalue_output(name, buffer._value)
        self._kept[name] = buffer
        return buffer

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


def _run_options(capture: str | None) -> Any:
    options = _onnxruntime().RunOptions()
    options.log_severity_level = SILENT
    if capture is not None:
        options.add_run_config_entry(_CAPTURE, capture)
    return options


def _value_of(array: np.ndarray, dtype: str) -> Any:
    ort = _onnxruntime()
    if dtype == "bf16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ONNX_TYPES[dtype])
    return ort.OrtValue.ortvalue_from_numpy(array)


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


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(".")
