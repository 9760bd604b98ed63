"""The vision and audio encoders of an artifact: loaded when a request first needs one, released on demand."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gemma3n_onnx.runtime.artifact import AudioInfo, Manifest, VisionInfo
from gemma3n_onnx.runtime.errors import ArtifactError, ClosedError, OptionError

from .decoder_io import check_signature
from .ort import Session
from .providers.base import ExecutionProvider

NAMES = ("vision", "audio")


class Encoders:
    """Runs encoders on one image or clip; sessions stay loaded until `release`."""

    def __init__(
        self, folder: Path, manifest: Manifest, provider: ExecutionProvider, threads: int | None = None
    ) -> None:
        self._folder, self._provider, self._threads = folder, provider, threads
        self._infos, self._quantized = manifest.encoders, bool(manifest.quantization)
        self._export_id = manifest.export_id
        self._width = manifest.token_embeddings.width
        self._sessions: dict[str, Session] = {}
        self._closed = False
        self._lock = threading.Lock()

    @property
    def loaded(self) -> tuple[str, ...]:
        """The modalities whose encoder is in memory."""
        return tuple(self._sessions)

    def features(self, modality: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Embeddings [count, H] fp32 of one image or clip.

        Raises:
            ArtifactError: the encoder's files are damaged.
            ProviderError: out of memory, or the provider does not support the compute dtype.
            ClosedError: after `close`.
        """
        info = self._infos[modality]
        outputs = self._session(modality, info).run(inputs)
        features = outputs[info.graph.outputs[0].name]
        if features.shape != (wanted := (info.soft_tokens.count, self._width)):
            raise ArtifactError(
                f"{info.graph.file} returns features of shape {list(features.shape)} instead of {list(wanted)}; "
                "export the artifact again."
            )
        return features

    def release(self, modality: str | None = None) -> None:
        """Unloads one encoder, or all; the next request that needs one loads it again.

        Raises:
            OptionError: an unknown name.
        """
        if modality is not None and modality not in NAMES:
            raise OptionError(f"Unknown encoder {modality!r}; release {' or '.join(NAMES)}.")
        with self._lock:
            for name in NAMES if modality is None else (modality,):
                self._sessions.pop(name, None)

    def close(self) -> None:
        """Unloads all; none can run after it."""
        with self._lock:
            self._closed = True
            self._sessions.clear()

    def _session(self, modality: str, info: VisionInfo | AudioInfo) -> Session:
        with self._lock:
            if self._closed:
                raise ClosedError
            if modality not in self._sessions:
                self._provider.require(info.compute_dtype, f"The {modality} encoder")
                session = Session(
                    self._folder / info.graph.file,
                    self._provider,
                    self._threads,
                    export_id=self._export_id,
                    quantized=self._quantized,
                )
                check_signature(session, info.graph)
                self._sessions[modality] = session
            return self._sessions[modality]
