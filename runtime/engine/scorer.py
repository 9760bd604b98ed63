"""The scorer: a decoder that returns log-probabilities of given tokens, over the same weight files.

Its KV caches are its own and keep all positions, so that any prefix of the last text can be reused. It is loaded at the
first use.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gemma3n_onnx.runtime.artifact import TARGET_LOGPROBS, TARGETS, TOP_IDS, TOP_LOGPROBS, CacheInfo, Manifest
from gemma3n_onnx.runtime.errors import ArtifactError, ProviderError
from gemma3n_onnx.runtime.system import available_memory_bytes
from gemma3n_onnx.runtime.tokens import shared_prefix

from .decoder_io import check_decoder
from .kv_cache import CacheMemory, KVCache
from .ort import Binding, Session
from .providers.base import ExecutionProvider

SCORED_AT_ONCE = 32
"""Positions whose logits are computed together: 32 x 262,144 in fp32 take 34 MB. More are not faster."""
_CAPACITY_STEP = 1024


def second_weights_bytes(manifest: Manifest) -> int:
    """What the scorer's weights take beside the decoder's: nothing in fp32, because they are mapped, and shared; all
    others take memory a second time."""
    shared = manifest.storage == manifest.compute_dtype and not manifest.quantization
    return 0 if shared else manifest.step_bytes


def scorer_caches(manifest: Manifest) -> tuple[CacheInfo, ...]:
    """The decoder's KV caches; those of sliding layers keep all positions, too."""
    return tuple(replace(info, window=None) for info in manifest.caches)


def scorer_capacity(tokens: int) -> int:
    """Of the KV caches for a text of `tokens`."""
    return max(-(-tokens // _CAPACITY_STEP), 1) * _CAPACITY_STEP


@dataclass(frozen=True)
class TokenScores:
    """Natural-log probabilities at n positions: `logprobs` [n] fp32 of the targets, and `top_logprobs` [n, K] fp32 of
    the most likely tokens `top_ids` [n, K] int64, descending."""

    logprobs: np.ndarray
    top_logprobs: np.ndarray
    top_ids: np.ndarray

    def last(self) -> TokenScores:
        """The scores of the last position, of its most likely token as the target."""
        return TokenScores(self.top_logprobs[-1:, 0], self.top_logprobs[-1:], self.top_ids[-1:])


class Scorer:
    """The session and the KV cache; `keys` identify the tokens in the cache."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        provider: ExecutionProvider,
        threads: int | None,
        memory_budget: int | None,
    ) -> None:
        self._budget = memory_budget
        self._folder, self._manifest, self._provider, self._threads = folder, manifest, provider, threads
        self._infos = scorer_caches(manifest)
        self.session: Session | None = None
        self.cache: KVCache | None = None
        self.keys: list[Hashable] = []

    def load(self) -> Session:
        """Raises:
        ArtifactError: the artifact has no scorer. ProviderError: there is not enough memory for its weights.
        """
        if self.session is None:
            info = self._manifest.scorer
            if info is None:
                raise ArtifactError(
                    "This artifact has no graph that scores given text; export it again with this version."
                )
            self._require_memory()
            session = Session(
                self._folder / info.file,
                self._provider,
                self._threads,
                export_id=self._manifest.export_id,
                quantized=bool(self._manifest.quantization),
            )
            outputs = {TARGET_LOGPROBS: ("fp32", None), TOP_LOGPROBS: ("fp32", None), TOP_IDS: ("int64", None)}
            check_decoder(session, self._manifest, info, outputs, {TARGETS: ("int64", None)})
            self.session = session
        return self.session

    def _require_memory(self) -> None:
        needed = second_weights_bytes(self._manifest)
        free = available_memory_bytes() if self._budget is None else self._budget - self._manifest.step_bytes
        if needed and free is not None and needed > free:
            left = max(free, 0) / 1e9
            raise ProviderError(
                f"Scoring text takes {needed / 1e9:.3g} GB more for the weights, but {left:.3g} GB are free; free "
                "memory, raise memory_budget, or score an artifact in fp32, whose weights are shared.",
                option="memory_budget",
            )

    def prepare(self, keys: list[Hashable], needed: int) -> KVCache:
        """The cache with room for `keys`, truncated to the prefix that they share with its tokens, of at most `needed`
        tokens."""
        shared = min(shared_prefix(self.keys, keys), needed)
        if self.cache is None or self.cache.capacity < len(keys):
            capacity = scorer_capacity(len(keys))
            self.cache, shared = None, 0  # before the larger one, so that both are not in memory together
            self.cache = KVCache(CacheMemory.allocate(self._infos, self._provider, 1, capacity))
        self.cache.truncate(0, shared)
        self.keys = keys[:shared]
        return self.cache

    @property
    def top(self) -> int:
        """K, the number of tokens listed at each position."""
        assert self._manifest.scorer is not None
        (width,) = (info.shape[-1] for info in self._manifest.scorer.outputs if info.name == TOP_IDS)
        assert isinstance(width, int)
        return width

    def release(self) -> None:
        self.session, self.cache, self.keys = None, None, []


class ScoreBuffers:
    """Outputs of one run over `count` positions."""

    def __init__(self, binding: Binding, count: int, top: int) -> None:
        self._logprobs = np.empty((1, count), np.float32)
        self._top_logprobs = np.empty((1, count, top), np.float32)
        self._top_ids = np.empty((1, count, top), np.int64)
        for name, array in (
            (TARGET_LOGPROBS, self._logprobs),
            (TOP_LOGPROBS, self._top_logprobs),
            (TOP_IDS, self._top_ids),
        ):
            binding.output(name, array)

    def scores(self) -> TokenScores:
        return TokenScores(self._logprobs[0], self._top_logprobs[0], self._top_ids[0])


def joined(parts: Sequence[TokenScores], top: int) -> TokenScores:
    """The scores of consecutive runs; of none, if there are no parts."""
    nothing = TokenScores(np.empty(0, np.float32), np.empty((0, top), np.float32), np.empty((0, top), np.int64))
    return TokenScores(
        np.concatenate([part.logprobs for part in (nothing, *parts)]),
        np.concatenate([part.top_logprobs for part in (nothing, *parts)]),
        np.concatenate([part.top_ids for part in (nothing, *parts)]),
    )
