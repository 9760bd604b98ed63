"""ONNX Runtime: sessions, buffers and IO binding. The only importer of onnxruntime."""

from __future__ import annotations

import ctypes
import itertools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from gemma3n_onnx.runtime.artifact import BYTES_PER_VALUE, EXPORT_ID, MANIFEST, TensorInfo
from gemma3n_onnx.runtime.checks import require_integer
from gemma3n_onnx.runtime.errors import ArtifactError, ProviderError, RuntimeMissingError

MINIMUM_VERSION = (1, 31)
SILENT = 4  # log severity "fatal": other errors are raised as exceptions, and need not be logged too

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"  # of a graph loaded from bytes
_CAPTURE = "gpu_graph_id"
_NO_CAPTURE = "-1"

_ONNX_TYPES = {"fp32": 1, "int64": 7, "fp16": 10, "bf16": 16}


class Device(Protocol):
    """The part of `providers.base.ExecutionProvider` that sessions and buffers use."""

    ort_name: ClassVar[str]
    device: ClassVar[str]

    @property
    def device_id(self) -> int: ...
    @property
    def rewrite(self) -> Callable[[Path], bytes] | None: ...
    def session_config(self, *, quantized: bool) -> Mapping[str, str]: ...
    def provider_options(self, *, captures: bool) -> Mapping[str, str]: ...


class Buffer:
    """Uninitialised memory on the provider's device, addressed by row (axis 0)."""

    def __init__(self, provider: Device, shape: tuple[int, ...], dtype: str) -> None:
        self.provider, self.shape, self.dtype = provider, shape, dtype
        ort = onnxruntime_module()
        self.nbytes = math.prod(shape) * BYTES_PER_VALUE[dtype]
        try:
            self._value = ort.OrtValue.ortvalue_from_shape_and_type(
                list(shape), _element_type(dtype), provider.device, provider.device_id
            )
        except Exception as error:  # onnxruntime has no specific type for this
            raise ProviderError(
                f"{provider.ort_name} cannot allocate {self.nbytes / 1e9:.2f} GB for a KV cache "
                f"({_first_line(error)}); use a smaller batch, a shorter prompt or a lower max_new_tokens.",
                option="max_new_tokens",
            ) from error

    def array(self) -> np.ndarray:
        """A view of a buffer on the CPU; fp16 and bf16 as uint16."""
        types: dict[str, Any] = {"fp32": ctypes.c_float, "int64": ctypes.c_int64}
        memory = types.get(self.dtype, ctypes.c_uint16)
        count = math.prod(self.shape)
        whole = (memory * count).from_address(self._value.data_ptr())
        return np.frombuffer(whole, dtype=np.dtype(memory)).reshape(self.shape)

    def address(self, row: int) -> int:
        return self._value.data_ptr() + row * (self.nbytes // self.shape[0])

    def fill(self, array: np.ndarray) -> None:
        """Copies a host array of the same shape into the buffer; bf16 as uint16 bits."""
        assert array.shape == self.shape, f"{array.shape} instead of {self.shape}"
        self._value.update_inplace(np.ascontiguousarray(array))

    def to_host(self) -> np.ndarray:
        """A copy of the contents, fp32 or int64."""
        return self._value.numpy()


class Session:
    """A loaded graph."""

    def __init__(
        self,
        path: Path,
        provider: Device,
        threads: int | None = None,
        *,
        export_id: str | None = None,
        quantized: bool = False,
        captures: bool = False,
    ) -> None:
        """`export_id`: of the manifest, which the graph must have, too; None for any. `quantized`: the graph has
        quantized weights. `captures`: bindings may capture a run and replay it."""
        ort = onnxruntime_module()
        options = ort.SessionOptions()
        options.log_severity_level = SILENT
        options.enable_mem_pattern = False
        if threads is not None:
            require_integer("threads", threads, 1)
            options.intra_op_num_threads = threads
        for key, value in provider.session_config(quantized=quantized).items():
            options.add_session_config_entry(key, value)
        providers = [(provider.ort_name, dict(provider.provider_options(captures=captures)))]
        graph: str | bytes = str(path)
        if provider.rewrite is not None:
            graph = provider.rewrite(path)
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(path.parent))
        try:
            self._session = ort.InferenceSession(graph, options, providers=providers, enable_fallback=0)
        except Exception as error:
            raise ArtifactError(
                f"ONNX Runtime cannot load {path} ({_first_line(error)}); copy it again or export the artifact again."
            ) from error
        own_id = self._session.get_modelmeta().custom_metadata_map.get(EXPORT_ID)
        if export_id not in (None, own_id):
            raise ArtifactError(
                f"{path} is of another export than the {MANIFEST} beside it; copy the whole artifact again, or load it "
                "again if it was replaced meanwhile."
            )
        if (active := self._session.get_providers())[0] != provider.ort_name:
            raise ProviderError(
                f"{provider.ort_name} did not start and ONNX Runtime fell back to {active[0]}; "
                "check that cuDNN 9 is installed and GPU memory is free."
            )
        self.provider, self._captures = provider, captures
        self._capture_ids = itertools.count(1)
        self.inputs = [_signature(node) for node in self._session.get_inputs()]
        self.outputs = [_signature(node) for node in self._session.get_outputs()]
        self.output_names = [output.name for output in self.outputs]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Host arrays in, host arrays out. ProviderError: the graph fails."""
        try:
            return dict(zip(self.output_names, self._session.run(None, dict(inputs))))
        except Exception as error:
            raise _run_error(error, self.provider) from error

    def bind(self) -> Binding:
        return Binding(self)


class Binding:
    """IO binding of one session; bindings persist between runs."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._binding = session._session.io_binding()
        self._kept: dict[str, Any] = {}
        self._fixed: dict[str, Buffer] = {}
        self._options = _run_options(_NO_CAPTURE if session._captures else None)

    def capture(self) -> None:
        """Captures the next run and replays it afterwards. All inputs and outputs must be bound to device memory by
        then, and never move."""
        self._options = _run_options(str(next(self._session._capture_ids)))

    def fix_input(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        """Makes `input` copy arrays to a fixed device buffer."""
        buffer = Buffer(self._session.provider, shape, dtype)
        self._binding.bind_ortvalue_input(name, buffer._value)
        self._fixed[name] = buffer

    def device_input(self, name: str, buffer: Buffer) -> None:
        self._binding.bind_ortvalue_input(name, buffer._value)
        self._kept[name] = buffer

    def input(self, name: str, array: np.ndarray, dtype: str) -> None:
        """Binds a host array as an input; bf16 as uint16 bits."""
        if (fixed := self._fixed.get(name)) is not None:
            fixed.fill(array)
            return
        value = _value_of(array, dtype)
        self._binding.bind_ortvalue_input(name, value)
        self._kept[name] = (array, value)

    def device_buffer(self, past: str, present: str, buffer: Buffer, first_row: int, rows: int) -> None:
        """Binds rows of `buffer` as an input and an output: the graph updates them in place."""
        provider = self._session.provider
        shape = [rows, *buffer.shape[1:]]
        place = (provider.device, provider.device_id, _element_type(buffer.dtype), shape, buffer.address(first_row))
        self._binding.bind_input(past, *place)
        self._binding.bind_output(present, *place)
        self._kept[past] = buffer

    def device_output(self, name: str, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Binds an output to a new device buffer, and returns it."""
        buffer = Buffer(self._session.provider, shape, dtype)
        self._binding.bind_ortvalue_output(name, buffer._value)
        self._kept[name] = buffer
        return buffer

    def output(self, name: str, array: np.ndarray) -> None:
        """Binds an output to a host array."""
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._kept[name] = array

    def run(self) -> None:
        """ProviderError: the graph fails, for example out of memory."""
        try:
            self._session._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            raise _run_error(error, self._session.provider) from error


def available_providers() -> list[str]:
    """ONNX Runtime's names of the execution providers that are installed."""
    return onnxruntime_module().get_available_providers()


def _run_options(capture: str | None) -> Any:
    options = onnxruntime_module().RunOptions()
    options.log_severity_level = SILENT
    if capture is not None:
        options.add_run_config_entry(_CAPTURE, capture)
    return options


def _value_of(array: np.ndarray, dtype: str) -> Any:
    ort = onnxruntime_module()
    if dtype == "bf16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ONNX_TYPES[dtype])
    return ort.OrtValue.ortvalue_from_numpy(array)


def _element_type(dtype: str) -> Any:
    numpy_types = {"fp32": np.float32, "fp16": np.float16, "int64": np.int64}
    return numpy_types.get(dtype, _ONNX_TYPES[dtype])


def onnxruntime_module() -> Any:
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
    found = str(getattr(onnxruntime, "__version__", ""))  # missing in a folder that an uninstall left behind
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


def _run_error(error: Exception, provider: Device) -> ProviderError:
    return ProviderError(
        f"{provider.ort_name} failed in the graph ({_first_line(error)}); if memory is short, use a smaller batch, "
        "a shorter prompt or a smaller prefill_chunk."
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(".")
