"""Outputs of a decode step: logits on the host, or logits and an argmax on the device.

Shape legend: B rows of the batch, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from gemma3n_onnx.runtime.artifact import LOGITS, NEXT_LOGIT, NEXT_TOKEN, Manifest

from .candidates import Candidates, Chosen
from .ort import Binding, Buffer


class Steps(ABC):
    """IO binding of decode steps of one batch size; `mask_length` fixes the attention mask's columns, None lets them
    grow with the longest row."""

    has_candidates = False
    """Whether `candidates` copies less to the host than `logits`."""

    def __init__(self, binding: Binding, mask_length: int | None = None) -> None:
        self.binding, self.mask_length = binding, mask_length

    @abstractmethod
    def logits(self) -> np.ndarray:
        """[B, V] fp32 on the host, valid until the next step."""

    def greedy(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [B] int64 of the largest logits, and those logits [B] fp32; a NaN counts as the largest."""
        logits = self.logits()
        tokens = logits.argmax(-1)
        return tokens, np.take_along_axis(logits, tokens[:, None], 1)[:, 0]

    def candidates(self, count: int) -> list[Chosen]:
        """For each row at least the `count` largest logits and their ties."""
        logits = self.logits()
        return [(np.arange(logits.shape[1]), row) for row in logits]


class HostSteps(Steps):
    """Logits are written to a host array."""

    def __init__(self, binding: Binding, manifest: Manifest, rows: int) -> None:
        super().__init__(binding)
        self._logits = np.empty((rows, 1, manifest.vocab_size), dtype=np.float32)
        binding.output(LOGITS, self._logits)

    def logits(self) -> np.ndarray:
        return self._logits[:, 0]


@dataclass(frozen=True)
class _Argmax:
    token: Buffer
    logit: Buffer


class DeviceSteps(Steps):
    """Logits stay on the device; argmax and candidates are computed there if the graphs have them."""

    def __init__(
        self,
        binding: Binding,
        manifest: Manifest,
        rows: int,
        candidates: Candidates,
        mask_length: int | None = None,
    ) -> None:
        super().__init__(binding, mask_length)
        self._logits = binding.device_output(LOGITS, (rows, 1, manifest.vocab_size), "fp32")
        self._argmax: _Argmax | None = None
        self._candidates = candidates
        if {NEXT_TOKEN, NEXT_LOGIT} <= {tensor.name for tensor in manifest.decoder.outputs}:
            self._argmax = _Argmax(
                binding.device_output(NEXT_TOKEN, (rows, 1, 1), "int64"),
                binding.device_output(NEXT_LOGIT, (rows, 1, 1), "fp32"),
            )
            self.has_candidates = True

    def logits(self) -> np.ndarray:
        return self._logits.to_host()[:, 0]

    def greedy(self) -> tuple[np.ndarray, np.ndarray]:
        if self._argmax is None:
            return super().greedy()
        return self._argmax.token.to_host()[:, 0, 0], self._argmax.logit.to_host()[:, 0, 0]

    def candidates(self, count: int) -> list[Chosen]:
        found = self._candidates.of(self._logits, count)
        return super().candidates(count) if found is None else found
