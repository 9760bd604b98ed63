"""KV caches of a batch, laid out from the manifest.

Each cache is two buffers [rows, kv_heads, capacity, head_dim] on the device. A full-attention layer's
capacity is the requested context, a sliding layer's is its window plus the provider's slack. The graph
updates the buffers in place: past and present are the same memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemma3n_onnx.runtime.artifact import CacheInfo

from .kv_window import can_truncate
from .ort import Binding, Buffer
from .providers.base import ExecutionProvider

CAPACITY_STEP = 1024
KEPT_IDLE = 2


@dataclass(frozen=True)
class LayerCache:
    info: CacheInfo
    capacity: int
    key: Buffer
    value: Buffer


@dataclass
class CacheMemory:
    """The buffers of a cache, and IO bindings of decode steps, cached by row count."""

    rows: int
    capacity: int
    layers: list[LayerCache]
    bound: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def allocate(
        cls, infos: tuple[CacheInfo, ...], provider: ExecutionProvider, rows: int, capacity: int
    ) -> CacheMemory:
        layers = []
        for info in infos:
            size = cache_capacity(info, provider, capacity)
            shape = (rows, info.kv_heads, size, info.head_dim)
            buffers = (Buffer(provider, shape, info.dtype) for _ in range(2))
            layers.append(LayerCache(info, size, *buffers))
        return cls(rows, capacity, layers)


class KVCache:
    """`lengths[row]` is the number of tokens processed in a row, at most `capacity`."""

    def __init__(self, memory: CacheMemory) -> None:
        self.memory, self.rows, self.capacity, self.layers = memory, memory.rows, memory.capacity, memory.layers
        self.lengths = np.zeros(memory.rows, dtype=np.int64)

    @property
    def nbytes(self) -> int:
        return sum(layer.key.nbytes + layer.value.nbytes for layer in self.layers)

    def bind(self, binding: Binding, first_row: int, rows: int) -> None:
        for layer in self.layers:
            info = layer.info
            binding.device_buffer(info.past_key, info.present_key, layer.key, first_row, rows)
            binding.device_buffer(info.past_value, info.present_value, layer.value, first_row, rows)

    def copy_windows(self) -> list[np.ndarray]:
        """Copies of the windowed caches, keys and values layer by layer."""
        return [buffer.array().copy() for layer in self._windowed for buffer in (layer.key, layer.value)]

    def fill_from(self, other: KVCache, tokens: int, windows: list[np.ndarray]) -> None:
        """Copies the first `tokens` of the only row of `other` into the only row; `windows` is the `copy_windows()` of
        `other` at that length."""
        for ours, theirs in zip(self.layers, other.layers):
            if ours.info.window is None:
                ours.key.array()[:, :, :tokens] = theirs.key.array()[:, :, :tokens]
                ours.value.array()[:, :, :tokens] = theirs.value.array()[:, :, :tokens]
        buffers = (buffer for layer in self._windowed for buffer in (layer.key, layer.value))
        for buffer, values in zip(buffers, windows, strict=True):
            buffer.array()[:] = values
        self.lengths[:] = tokens

    def fill_row(self, row: int, other: KVCache) -> None:
        """Copies the only row of `other`, which may have less capacity, into `row`."""
        tokens = int(other.lengths[0])
        for ours, theirs in zip(self.layers, other.layers):
            held = theirs.capacity if ours.info.window is not None else tokens
            ours.key.array()[row, :, :held] = theirs.key.array()[0, :, :held]
            ours.value.array()[row, :, :held] = theirs.value.array()[0, :, :held]
        self.lengths[row] = tokens

    @property
    def _windowed(self) -> list[LayerCache]:
        return [layer for layer in self.layers if layer.info.window is not None]

    @property
    def has_windows(self) -> bool:
        return bool(self._windowed)

    def truncate(self, row: int, length: int) -> bool:
        """Truncates `row` to its first `length` tokens; False (and no change) if windowed caches have
        already dropped positions that the shorter sequence needs."""
        now = int(self.lengths[row])
        exact = length == 0 or all(
            can_truncate(now, now - length, layer.capacity, layer.info.window)
            for layer in self.layers
            if layer.info.window is not None
        )
        if exact:
            self.lengths[row] = length
        return exact


@dataclass
class MemoryPool:
    """Reuses the memory of freed caches, so that steps captured over it stay valid. Capacities are rounded up, so that
    requests of similar lengths share memory."""

    allocate: Callable[[int, int], CacheMemory]
    max_capacity: int
    idle: list[CacheMemory] = field(default_factory=list)

    def cache(self, rows: int, capacity: int) -> KVCache:
        capacity = max(capacity, min(-(-capacity // CAPACITY_STEP) * CAPACITY_STEP, self.max_capacity))
        fitting = (memory for memory in self.idle if (memory.rows, memory.capacity) == (rows, capacity))
        memory = next(fitting, None)
        if memory is None:
            memory = self.allocate(rows, capacity)
        else:
            self.idle = [other for other in self.idle if other is not memory]
        cache = KVCache(memory)
        weakref.finalize(cache, self._return, memory).atexit = False
        return cache

    def _return(self, memory: CacheMemory) -> None:
        self.idle = [*self.idle, memory][-KEPT_IDLE:]

    def clear(self) -> None:
        self.idle = []


def cache_capacity(info: CacheInfo, provider: ExecutionProvider | type[ExecutionProvider], context: int) -> int:
    """Capacity in tokens of one cache, for a context of `context` tokens."""
    return context if info.window is None else provider.window_capacity(info.window)
