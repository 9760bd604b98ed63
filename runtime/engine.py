"""The decoder loop: token ids in, logits out. Knows nothing of text.

Shape legend: B rows of the batch, S tokens of one run, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from .artifact import Manifest
from .errors import ArtifactError, OptionError
from .kv_cache import KVCache
from .session import Binding, Profile, Session
from .slots import Slot, fill
from .tables import Table, to_compute_dtype

PREFILL_CHUNK = 512


class Engine:
    """A loaded decoder with its two tables."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        profile: Profile,
        *,
        threads: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        if not isinstance(prefill_chunk, int) or isinstance(prefill_chunk, bool) or prefill_chunk < 1:
            raise OptionError(f"prefill_chunk is {prefill_chunk!r}; give a positive number of tokens.")
        self.manifest, self.profile, self.prefill_chunk = manifest, profile, prefill_chunk
        self._tokens = Table(folder, manifest.token_embeddings, manifest.compute_dtype)
        self._per_layer = Table(folder, manifest.per_layer_embeddings, manifest.compute_dtype)
        quantized = bool(manifest.quantization)
        self._session = Session(folder / manifest.decoder.file, profile, threads, quantized=quantized)
        _check_graph(self._session, manifest)

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        return KVCache(self.manifest.caches, self.profile, rows, capacity)

    def prefill(
        self,
        cache: KVCache,
        row: int,
        ids: Sequence[int],
        slots: Sequence[Slot] = (),
        after_chunk: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Appends `ids` to one row, in chunks of bounded memory; logits [V] fp32 after the last.

        The features of `slots`, whose positions count from the first of `ids`, stand in for embeddings.
        `after_chunk` is told how many tokens the row then has.
        """
        self._require_logits("last")
        binding = self._bind(cache, row, 1)
        logits = self._output(binding, 1, 1)
        for chunk, embeds in self._chunks(ids, slots):
            self._run(binding, chunk, embeds, cache.lengths[row : row + 1])
            if after_chunk is not None:
                after_chunk(int(cache.lengths[row]))
        return logits[0, 0]

    def evaluate(self, ids: Sequence[int], slots: Sequence[Slot] = ()) -> np.ndarray:
        """Logits [S, V] fp32 at every position of `ids`, from an artifact exported with `--logits all`."""
        self._require_logits("all")
        cache = self.new_cache(1, len(ids))
        binding = self._bind(cache, 0, 1)
        parts = []
        for chunk, embeds in self._chunks(ids, slots):
            parts.append(self._output(binding, 1, chunk.shape[1]))
            self._run(binding, chunk, embeds, cache.lengths)
        return np.concatenate(parts, axis=1)[0]

    def decoder(self, cache: KVCache) -> Decoder:
        return Decoder(self, cache)

    def _require_logits(self, wanted: str) -> None:
        if self.manifest.logits != wanted:
            raise ArtifactError(
                f"This artifact was exported with --logits {self.manifest.logits}; "
                f"export it with --logits {wanted} for this."
            )

    def _chunks(self, ids: Sequence[int], slots: Sequence[Slot]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """ids, in order, as arrays [1, S] int64 with S up to `prefill_chunk`, and their embeddings [1, S, H]."""

        @functools.lru_cache(maxsize=1)  # a slot may lie in several chunks, one after another
        def features(slot: Slot) -> np.ndarray:
            return to_compute_dtype(slot.features(), self.manifest.compute_dtype)

        for first in range(0, len(ids), self.prefill_chunk):
            chunk = np.array(ids[first : first + self.prefill_chunk], dtype=np.int64)
            embeds = self._embed(chunk)
            fill(embeds, first, slots, features)
            yield chunk[None], embeds[None]

    def _embed(self, ids: np.ndarray) -> np.ndarray:
        """ids [n] int64 -> [n, H]; hard multimodal tokens have their rows after those of the whole vocabulary."""
        first = self.manifest.first_hard_token_id
        return self._tokens.rows(np.where(ids < first, ids, ids + (self.manifest.vocab_size - first)))

    def _bind(self, cache: KVCache, first_row: int, rows: int) -> Binding:
        binding = self._session.bind()
        cache.bind(binding, first_row, rows)
        return binding

    def _output(self, binding: Binding, rows: int, positions: int) -> np.ndarray:
        logits = np.empty((rows, positions, self.manifest.vocab_size), dtype=np.float32)
        binding.output("logits", logits)
        return logits

    def _run(self, binding: Binding, ids: np.ndarray, embeds: np.ndarray, lengths: np.ndarray) -> None:
        """Runs ids [B, S] with their embeddings [B, S, H] after `lengths` [B] tokens and adds S to the lengths."""
        rows, new = ids.shape
        flat = ids.reshape(-1)
        dtype = self.manifest.compute_dtype
        table_rows = np.where(flat < self.manifest.per_layer_embeddings.rows, flat, 0)
        binding.input("inputs_embeds", embeds, dtype)
        binding.input("per_layer_inputs", self._per_layer.rows(table_rows).reshape(rows, new, -1), dtype)
        binding.input("position_ids", lengths[:, None] + np.arange(new), "int64")
        binding.input("attention_mask", _mask(lengths + new, new), "int64")
        binding.run()
        lengths += new


def _check_graph(session: Session, manifest: Manifest) -> None:
    """Raises ArtifactError where the decoder does not take and give what the runtime binds."""
    compute = manifest.compute_dtype
    inputs = {
        "inputs_embeds": (compute, manifest.token_embeddings.width),
        "per_layer_inputs": (compute, manifest.per_layer_embeddings.width),
        "position_ids": ("int64", None),
        "attention_mask": ("int64", None),
    }
    outputs: dict[str, tuple[str, int | None]] = {"logits": ("fp32", manifest.vocab_size)}
    for cache in manifest.caches:
        inputs |= dict.fromkeys((cache.past_key, cache.past_value), (cache.dtype, cache.head_dim))
        outputs |= dict.fromkeys((cache.present_key, cache.present_value), (cache.dtype, cache.head_dim))
    for kind, wanted, found in (("input", inputs, session.inputs), ("output", outputs, session.outputs)):
        tensors = {tensor.name: tensor for tensor in found}
        for name, (dtype, width) in wanted.items():
            tensor = tensors.pop(name, None)
            if tensor is None:
                complaint = f"has no {kind} {name!r}"
            elif tensor.dtype != dtype:
                complaint = f"has the {kind} {name!r} in {tensor.dtype} instead of {dtype}"
            elif width is not None and tensor.shape and isinstance(tensor.shape[-1], int) and tensor.shape[-1] != width:
                complaint = f"has the {kind} {name!r} of width {tensor.shape[-1]} instead of {width}"
            else:
                continue
            raise ArtifactError(f"{manifest.decoder.file} {complaint}; export the artifact again.")
        if kind == "input" and tensors:
            raise ArtifactError(
                f"{manifest.decoder.file} has the input {min(tensors)!r}, which the manifest does not describe; "
                "export the artifact again."
            )


class Decoder:
    """One token a step for every row of a cache. What is bound is bound once."""

    def __init__(self, engine: Engine, cache: KVCache) -> None:
        self._engine, self._cache = engine, cache
        self._binding = engine._bind(cache, 0, cache.rows)
        self._logits = engine._output(self._binding, cache.rows, 1)[:, 0]

    def step(self, tokens: np.ndarray, running: np.ndarray) -> np.ndarray:
        """tokens [B] int64, running [B] bool -> logits [B, V] fp32, valid until the next step.

        Rows that are not running compute along, do not count the token, and cannot run again: their windowed
        caches may have dropped positions at each step.
        """
        lengths = self._cache.lengths.copy()
        self._engine._run(self._binding, tokens[:, None], self._engine._embed(tokens)[:, None], lengths)
        self._cache.lengths[running] = lengths[running]
        return self._logits


def _mask(lengths: np.ndarray, new: int) -> np.ndarray:
    """A mask [B, max length] whose row sums are `lengths` and whose last `new` columns are ones."""
    total = int(lengths.max())
    columns = np.arange(total)
    mask = (columns < (lengths - new)[:, None]) | (columns >= total - new)
    return mask.astype(np.int64)
