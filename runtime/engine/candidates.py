"""Selects the top logits on the device, so that top-k sampling copies only these to the host."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gemma3n_onnx.runtime.artifact import Manifest

from .decoder_io import check_signature
from .ort import Binding, Buffer, Device, Session

Chosen = tuple[np.ndarray, np.ndarray]
"""Ids [n] int64, ascending, and their logits [n] fp32."""


class Candidates:
    """The top-k graph of an artifact that has one, loaded at first use."""

    def __init__(self, folder: Path, manifest: Manifest, provider: Device) -> None:
        self._folder, self._info, self._provider = folder, manifest.candidates, provider
        self._export_id = manifest.export_id
        self._session: Session | None = None
        self._bound: tuple[Buffer, Binding, Buffer, Buffer] | None = None

    def of(self, logits: Buffer, wanted: int) -> list[Chosen] | None:
        """Candidates of logits [B, 1, V]: for each row the `wanted` largest and their ties; None if the graph returns
        too few to hold all ties."""
        if self._info is None or wanted > (count := int(self._info.outputs[0].shape[-1])):
            return None
        _, binding, largest, ids = self._bind(logits, count)
        binding.run()
        return in_order(ids.to_host()[:, 0], largest.to_host()[:, 0], wanted)

    def _bind(self, logits: Buffer, count: int) -> tuple[Buffer, Binding, Buffer, Buffer]:
        assert self._info is not None
        if self._session is None:
            session = Session(self._folder / self._info.file, self._provider, export_id=self._export_id)
            check_signature(session, self._info)
            self._session = session
        if self._bound is None or self._bound[0] is not logits:
            binding, shape = self._session.bind(), (logits.shape[0], 1, count)
            binding.device_input(self._info.inputs[0].name, logits)
            largest, ids = (binding.device_output(output.name, shape, output.dtype) for output in self._info.outputs)
            self._bound = logits, binding, largest, ids
        return self._bound


def in_order(ids: np.ndarray, largest: np.ndarray, wanted: int) -> list[Chosen] | None:
    """Sorts each row of ids and logits [B, n], given in descending order of logits, by id; None if more than n tokens
    may tie with the last one wanted."""
    if (largest[:, wanted - 1] == largest[:, -1]).any():
        return None
    order = np.argsort(ids, axis=1)
    return [(row[at], values[at]) for row, values, at in zip(ids, largest, order)]
