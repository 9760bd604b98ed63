"""The decoder loop: token ids in, logits out. Knows nothing of text.

Shape legend: B rows of the batch, S tokens of one run, V vocabulary.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gemma3n_onnx.runtime.artifact import NEXT_LOGIT, NEXT_TOKEN, Manifest
from gemma3n_onnx.runtime.errors import ArtifactError, OptionError, no_token
from gemma3n_onnx.runtime.tokens import Slot, fill

from .candidates import Candidates, Chosen
from .decoder_io import check_decoder
from .kv_cache import CacheMemory, KVCache, MemoryPool
from .ort import Binding, Buffer, Profile, Session
from .prefill_graph import PrefillGraph
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
        self._session = Session(
            folder / manifest.decoder.file, profile, threads, quantized=quantized, captures=profile.captures
        )
        check_decoder(self._session, manifest, manifest.decoder.file, logits=True)
        self.prefill_graph = PrefillGraph(folder, manifest, profile, threads, memory_budget)
        self._allocate = functools.partial(CacheMemory.allocate, manifest.caches, profile)
        self._pool = MemoryPool(self._allocate, manifest.max_context)
        self._captures = itertools.count(1)
        self._candidates = Candidates(folder, manifest, profile)

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """A cache with room for at least `capacity` tokens in each row."""
        return self._pool.cache(rows, capacity) if self.profile.captures else KVCache(self._allocate(rows, capacity))

    def release(self) -> None:
        """Frees what another prompt would load or allocate again."""
        self.prefill_graph.release()
        self._pool.clear()

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

    def decoder(self, cache: KVCache, rows: int | None = None) -> Decoder:
        """Steps of the first `rows` of a cache, or of all."""
        return Decoder(self, cache, cache.rows if rows is None else rows)

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

    def _bind_steps(self, cache: KVCache, rows: int) -> _Steps:
        manifest = self.manifest
        binding = self._bind(self._session, cache, 0, rows)
        if self.profile.device == "cpu":
            return _Steps(binding, self._output(binding, rows, 1))
        steps = _Steps(binding, binding.device_output("logits", (rows, 1, manifest.vocab_size), "fp32"))
        if {NEXT_TOKEN, NEXT_LOGIT} <= {tensor.name for tensor in manifest.decoder.outputs}:
            steps = replace(
                steps,
                next_token=binding.device_output(NEXT_TOKEN, (rows, 1, 1), "int64"),
                next_logit=binding.device_output(NEXT_LOGIT, (rows, 1, 1), "fp32"),
                candidates=self._candidates,
            )
        if not self.profile.captures:
            return steps
        binding.fix_input("inputs_embeds", (rows, 1, manifest.token_embeddings.width), manifest.compute_dtype)
        binding.fix_input("per_layer_inputs", (rows, 1, manifest.per_layer_embeddings.width), manifest.compute_dtype)
        binding.fix_input("position_ids", (rows, 1), "int64")
        binding.fix_input("attention_mask", (rows, cache.capacity), "int64")
        binding.capture(next(self._captures))
        return replace(steps, mask_length=cache.capacity)

    def _output(self, binding: Binding, rows: int, positions: int) -> np.ndarray:
        logits = np.empty((rows, positions, self.manifest.vocab_size), dtype=np.float32)
        binding.output("logits", logits)
        return logits

    def _run(
        self, binding: Binding, ids: np.ndarray, embeds: np.ndarray, lengths: np.ndarray, mask_length: int | None = None
    ) -> None:
        """Runs ids [B, S] with their embeddings [B, S, H] after `lengths` [B] tokens and adds S to the lengths.
        The mask has `mask_length` columns, by default no more than are needed."""
        rows, new = ids.shape
        flat = ids.reshape(-1)
        dtype = self.manifest.compute_dtype
        table_rows = np.where(flat < self.manifest.per_layer_embeddings.rows, flat, 0)
        binding.input("inputs_embeds", embeds, dtype)
        binding.input("per_layer_inputs", self._per_layer.rows(table_rows).reshape(rows, new, -1), dtype)
        binding.input("position_ids", lengths[:, None] + np.arange(new), "int64")
        binding.input("attention_mask", _mask(lengths + new, mask_length), "int64")
        binding.run()
        lengths += new


class Decoder:
    """One token a step for each of the first `rows` of a cache, B in all. What is bound is bound once."""

    def __init__(self, engine: Engine, cache: KVCache, rows: int) -> None:
        self._engine, self._cache, self._rows = engine, cache, rows
        if rows not in cache.memory.bound:
            cache.memory.bound[rows] = engine._bind_steps(cache, rows)
        self._bound: _Steps = cache.memory.bound[rows]

    @property
    def has_candidates(self) -> bool:
        """Whether `step_candidates` takes less than `step`."""
        return self._bound.candidates is not None

    def step(self, tokens: np.ndarray, running: np.ndarray) -> np.ndarray:
        """tokens [B] int64, running [B] bool -> logits [B, V] fp32, valid until the next step.

        Rows that are not running compute along, do not count the token, and cannot run again: their windowed
        caches may have dropped positions at each step.
        """
        self._advance(tokens, running)
        return self._bound.host_logits()

    def step_likeliest(self, tokens: np.ndarray, running: np.ndarray) -> np.ndarray:
        """As `step`, but gives the likeliest token [B] int64 of each row, chosen where the logits are.

        Raises:
            ProviderError: no token of a running row has a finite logit as the largest.
        """
        self._advance(tokens, running)
        likeliest, largest = self._bound.likeliest()
        self._check_finite(largest, running)
        return likeliest

    def step_candidates(self, tokens: np.ndarray, running: np.ndarray, wanted: int) -> list[Chosen]:
        """As `step`, but gives for each row ids and logits, in the order of the ids: the `wanted` largest and all their
        equals are among them.

        Raises:
            ProviderError: no token of a running row has a finite logit as the largest.
        """
        self._advance(tokens, running)
        self._check_finite(self._bound.likeliest()[1], running)
        return self._bound.chosen(wanted)

    @staticmethod
    def _check_finite(largest: np.ndarray, running: np.ndarray) -> None:
        if not np.isfinite(largest[running]).all():
            raise no_token(float(largest[running][~np.isfinite(largest[running])][0]))

    def _advance(self, tokens: np.ndarray, running: np.ndarray) -> None:
        engine, bound = self._engine, self._bound
        lengths = self._cache.lengths[: self._rows].copy()
        engine._run(bound.binding, tokens[:, None], engine._embed(tokens)[:, None], lengths, bound.mask_length)
        self._cache.lengths[: self._rows][running] = lengths[running]


@dataclass(frozen=True)
class _Steps:
    """What decode steps are bound to: the logits [B, 1, V] on the host, or on the device with what is chosen there."""

    binding: Binding
    logits: np.ndarray | Buffer
    mask_length: int | None = None
    next_token: Buffer | None = None
    next_logit: Buffer | None = None
    candidates: Candidates | None = None

    def host_logits(self) -> np.ndarray:
        return (self.logits.to_host() if isinstance(self.logits, Buffer) else self.logits)[:, 0]

    def likeliest(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [B] and their logits [B]; a NaN is the largest of all."""
        if self.next_token is not None and self.next_logit is not None:
            return self.next_token.to_host()[:, 0, 0], self.next_logit.to_host()[:, 0, 0]
        logits = self.host_logits()
        tokens = logits.argmax(-1)
        return tokens, np.take_along_axis(logits, tokens[:, None], 1)[:, 0]

    def chosen(self, wanted: int) -> list[Chosen]:
        assert self.candidates is not None and isinstance(self.logits, Buffer)
        if (found := self.candidates.of(self.logits, wanted)) is not None:
            return found
        logits = self.host_logits()
        return [(np.arange(logits.shape[1]), row) for row in logits]


def _mask(lengths: np.ndarray, columns: int | None) -> np.ndarray:
    """A mask whose row sums are `lengths`, with no more columns than needed where None."""
    return (np.arange(lengths.max() if columns is None else columns) < lengths[:, None]).astype(np.int64)
