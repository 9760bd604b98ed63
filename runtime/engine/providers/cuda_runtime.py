"""Queries CUDA's runtime library: start-up problems, memory in use, and memory bandwidth.

ONNX Runtime would only log a start-up problem and fall back to the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import time
from pathlib import Path
from typing import Any

from gemma3n_onnx.runtime.system import mapped_files

_REPORTED = 3  # log severity "error"
_LIBRARY = "libonnxruntime_providers_cuda.so"

# Of cudaError_t.
_CAUSES = {
    35: "the NVIDIA driver is too old for the CUDA libraries; update the driver",
    100: "no NVIDIA GPU is visible to this process; check nvidia-smi and CUDA_VISIBLE_DEVICES",
    803: "the NVIDIA driver and its libraries have different versions; restart the machine",
    999: "the NVIDIA driver does not respond; check nvidia-smi",
}


def trouble(onnxruntime: Any, device_id: int) -> str | None:
    """Why the GPU cannot be used, and what to do; None if no problem is found."""
    onnxruntime.set_default_logger_severity(_REPORTED)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints libraries missing from pip, which the system may have
        onnxruntime.preload_dlls()
    folder = Path(onnxruntime.__file__).parent / "capi"
    if not (folder / _LIBRARY).exists():  # not Linux: the library has another name
        return None
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / _LIBRARY))
    except OSError as error:
        return (
            f'a library is missing ({error}); install CUDA\'s libraries with: pip install "onnxruntime-gpu[cuda,cudnn]"'
        )
    return _trouble_of_device(device_id)


def _trouble_of_device(device_id: int) -> str | None:
    if (runtime := _runtime()) is None:
        return None
    count = ctypes.c_int()
    if code := runtime.cudaGetDeviceCount(ctypes.byref(count)):
        return _CAUSES.get(code, f"CUDA reports error {code}; check nvidia-smi")
    if device_id >= count.value:
        return f"there is no GPU {device_id}, the last is {count.value - 1}; give another device_id"
    return None


def memory_used(device_id: int) -> int | None:
    """Bytes in use on the GPU, by any process; None if CUDA is not loaded."""
    if (runtime := _runtime()) is None:
        return None
    available, total = ctypes.c_size_t(), ctypes.c_size_t()
    runtime.cudaSetDevice(device_id)
    code = runtime.cudaMemGetInfo(ctypes.byref(available), ctypes.byref(total))
    return None if code else total.value - available.value


def bandwidth(device_id: int) -> float | None:
    """Memory bandwidth of the GPU in bytes per second, reads plus writes, for copies of 512 MiB; None if CUDA is not
    loaded or its memory is full."""
    if (runtime := _runtime()) is None:
        return None
    size, times = 1 << 29, 20
    runtime.cudaSetDevice(device_id)
    places = [ctypes.c_void_p(), ctypes.c_void_p()]
    try:
        if any(runtime.cudaMalloc(ctypes.byref(place), ctypes.c_size_t(size)) for place in places):
            return None
        best = min(_seconds_of_copies(runtime, places, size, times) for _ in range(3))
    finally:
        for place in places:
            runtime.cudaFree(place)
    return 2 * size * times / best


def _seconds_of_copies(runtime: ctypes.CDLL, places: list[ctypes.c_void_p], size: int, times: int) -> float:
    on_device = 3
    runtime.cudaDeviceSynchronize()
    started = time.perf_counter()
    for _ in range(times):
        runtime.cudaMemcpyAsync(places[1], places[0], ctypes.c_size_t(size), on_device, None)
    runtime.cudaDeviceSynchronize()
    return time.perf_counter() - started


def _runtime() -> ctypes.CDLL | None:
    """The CUDA runtime that this process has loaded."""
    path = next((file for file in mapped_files() if "/libcudart.so" in file), None)
    return None if path is None else ctypes.CDLL(path)
