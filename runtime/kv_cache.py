"""KV caches of a batch, laid out from the manifest.

Each cache is two buffers [rows, kv_heads, capacity, head_dim] on the device. A full-attention layer's
capacity is the context asked for, a sliding layer's is its window and a little more. The graph updates
the buffers in place: past and present are the same memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .artifact import CacheInfo
from .kv_window import can_truncate
from .session import Binding, Buffer, Profile


@dataclass(frozen=True)
class LayerCache:
    info: CacheInfo
    capacity: int
    key: Buffer
    value: Buffer


class KVCache:
    """`lengths[row]` tokens have been processed in each row; at most `capacity` may be."""

    def __init__(self, infos: tuple[CacheInfo, ...], profile: Profile, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self.lengths = np.zeros(rows, dtype=np.int64)
        self.layers = []
        for info in infos:
            size = cache_capacity(info, profile, capacity)
            shape = (rows, info.kv_heads, size, info.head_dim)
            buffers = (Buffer(profile, shape, info.dtype) for _ in range(2))
            self.layers.append(LayerCache(info, size, *buffers))

    @property
    def nbytes(self) -> int:
        return sum(layer.key.nbytes + layer.value.nbytes for layer in self.layers)

    def bind(self, binding: Binding, first_row: int, rows: int) -> None:
        for layer in self.layers:
            info = layer.info
            binding.device_buffer(info.past_key, info.present_key, layer.key, first_row, rows)
            binding.device_buffer(info.past_value, info.present_value, layer.value, first_row, rows)

    def copy_windows(self) -> list[np.ndarray]:
        """What the windowed caches hold, keys and values layer by layer."""
        return [buffer.array().copy() for layer in self._windowed for buffer in (layer.key, layer.value)]

    def fill_from(self, other: KVCache, tokens: int, windows: list[np.ndarray]) -> None:
        """Makes the one row hold the first `tokens` of the one of `other`; `windows`: its `copy_windows()` when it held
        just those."""
        for ours, theirs in zip(self.layers, other.layers):
            if ours.info.window is None:
                ours.key.array()[:, :, :tokens] = theirs.key.array()[:, :, :tokens]
                ours.value.array()[:, :, :tokens] = theirs.value.array()[:, :, :tokens]
        buffers = (buffer for layer in self._windowed for buffer in (layer.key, layer.value))
        for buffer, values in zip(buffers, windows, strict=True):
            buffer.array()[:] = values
        self.lengths[:] = tokens

    @property
    def _windowed(self) -> list[LayerCache]:
        return [layer for layer in self.layers if layer.info.window is not None]

    def truncate(self, row: int, length: int) -> bool:
        """Forgets the tokens of `row` after the first `length`; False (and no change) where windowed
        caches have already dropped positions that the shorter sequence needs."""
        now = int(self.lengths[row])
        exact = length == 0 or all(
            can_truncate(now, now - length, layer.capacity, layer.info.window)
            for layer in self.layers
            if layer.info.window is not None
        )
        if exact:
            self.lengths[row] = length
        return exact


def cache_capacity(info: CacheInfo, profile: Profile, context: int) -> int:
    """Rows of one cache for `context` tokens."""
    if info.window is None:
        return context
    return info.window + int(info.window * profile.window_slack)
