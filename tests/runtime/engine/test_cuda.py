"""CUDA that cannot start, and the memory that recorded steps keep; no GPU is needed for any of it."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest

from gemma3n_onnx.runtime.engine.engine import StepRunner
from gemma3n_onnx.runtime.engine.kv_cache import CAPACITY_STEP, KEPT_IDLE, CacheMemory, MemoryPool
from gemma3n_onnx.runtime.engine.providers import cuda_runtime
from gemma3n_onnx.runtime.engine.providers.base import DeviceOptions
from gemma3n_onnx.runtime.errors import OptionError, ProviderError


class Library:
    """Of CUDA's runtime what is asked for the devices."""

    def __init__(self, code: int, count: int) -> None:
        self.code, self.count = code, count

    def cudaGetDeviceCount(self, count) -> int:
        count._obj.value = self.count
        return self.code


@pytest.fixture
def onnxruntime(tmp_path):
    (tmp_path / "capi").mkdir()
    return SimpleNamespace(
        __file__=str(tmp_path / "__init__.py"),
        set_default_logger_severity=lambda _: None,
        preload_dlls=lambda: print("Failed to load libcublas.so"),
    )


def test_a_missing_library_is_named(onnxruntime, tmp_path, capsys):
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").write_bytes(b"no library")
    told = cuda_runtime.trouble(onnxruntime, 0)
    assert told is not None and "libonnxruntime_providers_shared.so" in told and "pip install" in told
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("code", "count", "told"),
    [(35, 0, "update the driver"), (100, 0, "no NVIDIA GPU"), (77, 0, "error 77"), (0, 2, "no GPU 2, the last is 1")],
)
def test_what_the_driver_says_is_told(monkeypatch, onnxruntime, tmp_path, code, count, told):
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").touch()
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Library(code, count))
    monkeypatch.setattr(cuda_runtime, "mapped_files", lambda: ["/usr/lib/libc.so.6", "/usr/lib/libcudart.so.13"])
    assert told in (cuda_runtime.trouble(onnxruntime, 2) or "")


def test_a_device_that_is_there_is_no_trouble(monkeypatch, onnxruntime, tmp_path):
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").touch()
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Library(0, 1))
    monkeypatch.setattr(cuda_runtime, "mapped_files", lambda: ["/usr/lib/libc.so.6", "/usr/lib/libcudart.so.13"])
    assert cuda_runtime.trouble(onnxruntime, 0) is None


@pytest.mark.parametrize(("options", "name"), [({"id": -1}, "device_id"), ({"memory_limit": 0}, "gpu_memory_limit")])
def test_a_device_that_cannot_be_is_refused(options, name):
    with pytest.raises(OptionError, match=name):
        DeviceOptions(**options)


def test_memory_of_caches_is_used_again():
    made = []
    pool = MemoryPool(lambda rows, capacity: made.append((rows, capacity)) or CacheMemory(rows, capacity, []), 5000)
    first = pool.cache(1, 100)
    assert made == [(1, CAPACITY_STEP)]
    other = pool.cache(1, 200)
    assert other.memory is not first.memory
    memory = first.memory
    first.lengths[:] = 7
    del first
    again = pool.cache(1, CAPACITY_STEP)
    assert again.memory is memory and again.lengths.tolist() == [0]
    assert pool.cache(2, CAPACITY_STEP).memory is not memory
    assert pool.cache(1, 4999).capacity == 5000


def test_no_more_memory_is_kept_than_a_little():
    pool = MemoryPool(lambda rows, capacity: CacheMemory(rows, capacity, []), 10**6)
    caches = [pool.cache(1, 1000 * n) for n in range(1, KEPT_IDLE + 4)]
    newest = [cache.memory for cache in caches[-KEPT_IDLE:]]
    while caches:
        del caches[0]
    assert [memory.capacity for memory in pool.idle] == [memory.capacity for memory in newest]
    pool.clear()
    assert not pool.idle


def test_logits_that_are_no_numbers_choose_no_token():
    decoder = object.__new__(StepRunner)
    decoder._advance = lambda tokens, running: None
    decoder._bound = SimpleNamespace(greedy=lambda: (np.array([3, 4]), np.array([1.5, np.nan], np.float32)))
    assert decoder.step_greedy(np.zeros(2), np.array([True, False])).tolist() == [3, 4]
    with pytest.raises(ProviderError, match="nan"):
        decoder.step_greedy(np.zeros(2), np.array([True, True]))
