"""The decoder loop: token ids in, logits out. Knows nothing of text.

Shape legend: B rows of the batch, S tokens of one run, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from .artifact import Manifest
from .decoder_io import check_decoder
from .errors import ArtifactError, OptionError
from .kv_cache import KVCache
from .prefill import PrefillGraph
from .session import Binding, Profile, Session
from .slots import Slot, fill
from .tables import Table, to_compute_dtype

PREFILL_CHUNK = 512


class Engine:
    """A loaded decoder with its two tables, and perhaps another for prompts."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        profile: Profile,
        *,
        threads: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        memory_budget: int | None = None,
    ) -> None:
        if not isinstance(prefill_chunk, int) or isinstance(prefill_chunk, bool) or prefill_chunk < 1:
            raise OptionError(f"prefill_chunk is {prefill_chunk!r}; give a positive number of tokens.")
        self.manifest, self.profile, self.prefill_chunk = manifest, profile, prefill_chunk
        self._tokens = Table(folder, manifest.token_embeddings, manifest.compute_dtype)
        self._per_layer = Table(folder, manifest.per_layer_embeddings, manifest.compute_dtype)
        quantized = bool(manifest.quantization)
        self._session = Session(folder / manifest.decoder.file, profile, threads, quantized=quantized)
        check_decoder(self._session, manifest, manifest.decoder.file, logits=True)
        self.prefill_graph = PrefillGraph(folder, manifest, profile, threads, memory_budget)

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
        binding = self._bind(self._session, cache, row, 1)
        logits = self._output(binding, 1, 1)
        without_logits, first = binding, 0
        if (session := self.prefill_graph.session(len(ids))) is not None:
            without_logits, first = self._bind(session, cache, row, 1), len(ids) - 1
        for chunk, embeds in self._chunks(ids, slots, first):
            bound = without_logits if chunk.stop <= first else binding
            self._run(bound, np.array([ids[chunk.start : chunk.stop]]), embeds, cache.lengths[row : row + 1])
            if after_chunk is not None:
                after_chunk(int(cache.lengths[row]))
        return logits[0, 0]

    def evaluate(self, ids: Sequence[int], slots: Sequence[Slot] = ()) -> np.ndarray:
        """Logits [S, V] fp32 at every position of `ids`, from an artifact exported with `--logits all`."""
        self._require_logits("all")
        cache = self.new_cache(1, len(ids))
        binding = self._bind(self._session, cache, 0, 1)
        parts = []
        for chunk, embeds in self._chunks(ids, slots, 0):
            parts.append(self._output(binding, 1, len(chunk)))
            self._run(binding, np.array([ids[chunk.start : chunk.stop]]), embeds, cache.lengths)
        return np.concatenate(parts, axis=1)[0]

    def decoder(self, cache: KVCache) -> Decoder:
        return Decoder(self, cache)

    def _require_logits(self, wanted: str) -> None:
        if self.manifest.logits != wanted:
            raise ArtifactError(
                f"This artifact was exported with --logits {self.manifest.logits}; "
                f"export it with --logits {wanted} for this."
            )

    def _chunks(self, ids: Sequence[int], slots: Sequence[Slot], border: int) -> Iterator[tuple[range, np.ndarray]]:
        """Positions in order, up to `prefill_chunk` at once and none across `border`, and their embeddings
        [1, S, H]."""

        @functools.lru_cache(maxsize=1)  # a slot may lie in several chunks, one after another
        def features(slot: Slot) -> np.ndarray:
            return to_compute_dtype(slot.features(), self.manifest.compute_dtype)

        for part in (range(border), range(border, len(ids))):
            for first in part[:: self.prefill_chunk]:
                chunk = range(first, min(first + self.prefill_chunk, part.stop))
                embeds = self._embed(np.array(ids[chunk.start : chunk.stop], dtype=np.int64))
                fill(embeds, first, slots, features)
                yield chunk, embeds[None]

    def _embed(self, ids: np.ndarray) -> np.ndarray:
        """ids [n] int64 -> [n, H]; hard multimodal tokens have their rows after those of the whole vocabulary."""
        first = self.manifest.first_hard_token_id
        return self._tokens.rows(np.where(ids < first, ids, ids + (self.manifest.vocab_size - first)))

    def _bind(self, session: Session, cache: KVCache, first_row: int, rows: int) -> Binding:
        binding = session.bind()
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


class Decoder:
    """One token a step for every row of a cache. What is bound is bound once."""

    def __init__(self, engine: Engine, cache: KVCache) -> None:
        self._engine, self._cache = engine, cache
        self._binding = engine._bind(engine._session, cache, 0, cache.rows)
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
