"""The prefill graph: a decoder without logits whose products are in int8, for all of a prompt but its last token.

Its weights are packed into separate memory, which takes about a second. It is loaded once a prompt is long enough to
benefit and enough memory is free.
"""

from __future__ import annotations

from pathlib import Path

from gemma3n_onnx.runtime.artifact import Manifest
from gemma3n_onnx.runtime.checks import require_integer
from gemma3n_onnx.runtime.system import available_memory_bytes

from .decoder_io import check_decoder
from .ort import Session
from .providers.base import ExecutionProvider

WORTH_RUNNING = 16
"""Break-even prompt length: above it the prefill graph is faster than the decoder."""
WORTH_LOADING = 96


class PrefillGraph:
    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        provider: ExecutionProvider,
        threads: int | None,
        memory_budget: int | None,
    ) -> None:
        if memory_budget is not None:
            require_integer("memory_budget", memory_budget, 0)
        self._folder, self._manifest, self._provider, self._threads = folder, manifest, provider, threads
        self.budget = memory_budget
        """Bytes for the weights of this graph and the decoder; None: free memory decides."""
        self._session: Session | None = None

    def session(self, tokens: int) -> Session | None:
        """The graph, if `tokens` of a prompt benefit from it and it fits into memory."""
        info = self._manifest.prefill
        if info is None or tokens < (WORTH_LOADING if self._session is None else WORTH_RUNNING):
            return None
        if self._session is None and self._fits(info.file):
            self.load()
        return self._session

    def load(self) -> None:
        info = self._manifest.prefill
        assert info is not None
        session = Session(
            self._folder / info.file,
            self._provider,
            self._threads,
            export_id=self._manifest.export_id,
            quantized=True,
        )
        check_decoder(session, self._manifest, info, outputs={})
        self._session = session

    def release(self) -> None:
        self._session = None

    def _fits(self, file: str) -> bool:
        own = sum(info.bytes for name, info in self._manifest.files.items() if name.startswith(f"{file}."))
        if self.budget is not None:
            return self._manifest.step_bytes + own <= self.budget
        available = available_memory_bytes()
        return available is None or 2 * own <= available
