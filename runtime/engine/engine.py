"""Prefill and decode steps: token ids and embeddings in, logits or token ids out. No text processing.

Shape legend: B rows of the batch, S tokens of one run, V vocabulary.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gemma3n_onnx.runtime.artifact import (
    ATTENTION_MASK,
    INPUTS_EMBEDS,
    LOGITS,
    PER_LAYER_INPUTS,
    POSITION_IDS,
    TARGETS,
    Manifest,
)
from gemma3n_onnx.runtime.checks import require_integer
from gemma3n_onnx.runtime.errors import ArtifactError, ClosedError, no_token
from gemma3n_onnx.runtime.tokens import PromptTokens, SoftTokenSpan, fill

from .candidates import Candidates, Chosen
from .decoder_io import check_decoder, logits_of
from .kv_cache import CacheMemory, KVCache, MemoryPool
from .ort import Binding, Session
from .prefill_graph import PrefillGraph
from .providers.base import ExecutionProvider
from .scorer import SCORED_AT_ONCE, ScoreBuffers, Scorer, TokenScores, joined
from .steps import Steps
from .tables import EmbeddingTable, to_compute_dtype

PREFILL_CHUNK = 512


class Engine:
    """A loaded decoder with its two embedding tables, and a prefill graph if the artifact has one."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        provider: ExecutionProvider,
        *,
        threads: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        memory_budget: int | None = None,
    ) -> None:
        require_integer("prefill_chunk", prefill_chunk, 1)
        self.manifest, self.provider, self.prefill_chunk = manifest, provider, prefill_chunk
        self._tokens = EmbeddingTable(folder, manifest.token_embeddings, manifest.compute_dtype)
        self._per_layer = EmbeddingTable(folder, manifest.per_layer_embeddings, manifest.compute_dtype)
        quantized = bool(manifest.quantization)
        self._session = Session(
            folder / manifest.decoder.file,
            provider,
            threads,
            export_id=manifest.export_id,
            quantized=quantized,
            captures=provider.captures_steps,
        )
        check_decoder(self._session, manifest, manifest.decoder, logits_of(manifest))
        self.prefill_graph = PrefillGraph(folder, manifest, provider, threads, memory_budget)
        self._scorer = Scorer(folder, manifest, provider, threads, memory_budget)
        self._allocate = functools.partial(CacheMemory.allocate, manifest.caches, provider)
        self._pool = MemoryPool(self._allocate, manifest.max_context)
        self._candidates = Candidates(folder, manifest, provider)
        self._closed = False
        self.turns = threading.RLock()
        """Held during a step of a stream: an engine runs one graph at a time, for one thread."""

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """A cache with room for at least `capacity` tokens in each row."""
        self.require_open()
        if self.provider.captures_steps:
            return self._pool.cache(rows, capacity)
        return KVCache(self._allocate(rows, capacity))

    def release(self) -> None:
        """Frees the prefill graph, the scorer and idle KV caches; they return when needed."""
        self.prefill_graph.release()
        self._scorer.release()
        self._pool.clear()

    def close(self) -> None:
        """Frees everything; no graph can run after it. A KV cache that somebody holds keeps the decoder."""
        self.release()
        if not self._closed:
            self._closed = True
            del self._session, self._tokens, self._per_layer, self._candidates

    def require_open(self) -> None:
        """Raises ClosedError after `close`."""
        if self._closed:
            raise ClosedError

    def prefill(
        self,
        cache: KVCache,
        row: int,
        ids: Sequence[int],
        spans: Sequence[SoftTokenSpan] = (),
        after_chunk: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Appends `ids` to one row in chunks of `prefill_chunk`; returns the logits [V] fp32 after the last.

        The features of `spans`, whose positions count from the first of `ids`, replace embeddings. `after_chunk`
        receives the row's length after each chunk.
        """
        self.require_open()
        self._require_logits("last")
        binding = self._bind(self._session, cache, row, 1)
        logits = self._output(binding, 1, 1)
        without_logits, first = binding, 0
        if (session := self.prefill_graph.session(len(ids))) is not None:
            without_logits, first = self._bind(session, cache, row, 1), len(ids) - 1
        for chunk, embeds in self._chunks(ids, spans, first):
            bound = without_logits if chunk.stop <= first else binding
            self._run(bound, np.array([ids[chunk.start : chunk.stop]]), embeds, cache.lengths[row : row + 1])
            if after_chunk is not None:
                after_chunk(int(cache.lengths[row]))
        return logits[0, 0]

    def evaluate(self, ids: Sequence[int], spans: Sequence[SoftTokenSpan] = ()) -> np.ndarray:
        """Logits [S, V] fp32 at every position of `ids`, from an artifact exported with `--logits all`."""
        self._require_logits("all")
        cache = self.new_cache(1, len(ids))
        binding = self._bind(self._session, cache, 0, 1)
        parts = []
        for chunk, embeds in self._chunks(ids, spans, 0):
            parts.append(self._output(binding, 1, len(chunk)))
            self._run(binding, np.array([ids[chunk.start : chunk.stop]]), embeds, cache.lengths)
        return np.concatenate(parts, axis=1)[0]

    def score(
        self,
        prompt: PromptTokens,
        first: int,
        *,
        and_next: bool = False,
        after_chunk: Callable[[int], None] | None = None,
    ) -> TokenScores:
        """Scores the tokens of a prompt from position `first`, at least 1, on. `and_next` adds the position after the
        last token, whose target is token 0. `after_chunk` receives the number of tokens run, after each chunk.

        The prefix that the prompt shares with the one scored before is not run again.

        Raises:
            ArtifactError: the artifact has no scorer. ProviderError: a score is NaN.
        """
        self.require_open()
        session = self._scorer.load()
        keys = prompt.keys()[: len(prompt) if and_next else -1]
        cache = self._scorer.prepare(keys, first - 1)
        begin = int(cache.lengths[0])
        rest = prompt.after(begin)
        targets = np.array([*prompt.ids[first:], *([0] if and_next else [])])
        binding = self._bind(session, cache, 0, 1)
        parts = []
        for chunk, embeds in self._chunks(rest.ids[: len(keys) - begin], rest.spans, first - 1 - begin, SCORED_AT_ONCE):
            asked = chunk.start - (first - 1 - begin)
            wanted = targets[asked : asked + len(chunk)] if asked >= 0 else np.zeros(1, np.int64)
            buffers = ScoreBuffers(binding, len(wanted), self._scorer.top)
            binding.input(TARGETS, wanted[None], "int64")
            self._run(binding, np.array([rest.ids[chunk.start : chunk.stop]]), embeds, cache.lengths)
            self._scorer.keys = keys[: int(cache.lengths[0])]
            if asked >= 0:
                parts.append(buffers.scores())
            if after_chunk is not None:
                after_chunk(int(cache.lengths[0]))
        scores = joined(parts, self._scorer.top)
        if np.isnan(scores.logprobs).any():
            raise no_token(float("nan"))
        return scores

    def step_runner(self, cache: KVCache, rows: int | None = None) -> StepRunner:
        """Decode steps over the first `rows` of a cache, or all."""
        self.require_open()
        return StepRunner(self, cache, cache.rows if rows is None else rows)

    def _require_logits(self, wanted: str) -> None:
        if self.manifest.logits != wanted:
            raise ArtifactError(
                f"This artifact was exported with --logits {self.manifest.logits}; "
                f"export it with --logits {wanted} for this."
            )

    def _chunks(
        self, ids: Sequence[int], spans: Sequence[SoftTokenSpan], border: int, after: int | None = None
    ) -> Iterator[tuple[range, np.ndarray]]:
        """Ranges of up to `prefill_chunk` positions, and of up to `after` from `border` on, none across it, with their
        embeddings [1, S, H]."""

        @functools.lru_cache(maxsize=1)  # a span may extend over consecutive chunks
        def features(span: SoftTokenSpan) -> np.ndarray:
            return to_compute_dtype(span.features(), self.manifest.compute_dtype)

        sizes = (self.prefill_chunk, min(after or self.prefill_chunk, self.prefill_chunk))
        for part, size in zip((range(border), range(border, len(ids))), sizes):
            for first in part[::size]:
                chunk = range(first, min(first + size, part.stop))
                embeds = self._embed(np.array(ids[chunk.start : chunk.stop], dtype=np.int64))
                fill(embeds, first, spans, features)
                yield chunk, embeds[None]

    def _embed(self, ids: np.ndarray) -> np.ndarray:
        """ids [n] int64 -> [n, H]; the rows of hard multimodal tokens follow the vocabulary's."""
        first = self.manifest.first_hard_token_id
        return self._tokens.rows(np.where(ids < first, ids, ids + (self.manifest.vocab_size - first)))

    def _bind(self, session: Session, cache: KVCache, first_row: int, rows: int) -> Binding:
        binding = session.bind()
        cache.bind(binding, first_row, rows)
        return binding

    def _bind_steps(self, cache: KVCache, rows: int) -> Steps:
        binding = self._bind(self._session, cache, 0, rows)
        return self.provider.bind_steps(binding, self.manifest, rows, cache.capacity, self._candidates)

    def _output(self, binding: Binding, rows: int, positions: int) -> np.ndarray:
        logits = np.empty((rows, positions, self.manifest.vocab_size), dtype=np.float32)
        binding.output(LOGITS, logits)
        return logits

    def _run(
        self, binding: Binding, ids: np.ndarray, embeds: np.ndarray, lengths: np.ndarray, mask_length: int | None = None
    ) -> None:
        """Runs ids [B, S] with their embeddings [B, S, H] after `lengths` [B] tokens and adds S to the lengths.
        The mask has `mask_length` columns, by default as few as needed."""
        rows, new = ids.shape
        flat = ids.reshape(-1)
        dtype = self.manifest.compute_dtype
        table_rows = np.where(flat < self.manifest.per_layer_embeddings.rows, flat, 0)
        binding.input(INPUTS_EMBEDS, embeds, dtype)
        binding.input(PER_LAYER_INPUTS, self._per_layer.rows(table_rows).reshape(rows, new, -1), dtype)
        binding.input(POSITION_IDS, lengths[:, None] + np.arange(new), "int64")
        binding.input(ATTENTION_MASK, _mask(lengths + new, mask_length), "int64")
        try:
            binding.run()
        finally:
            lengths += new  # also after Ctrl-C, which is raised after the graph has run


class StepRunner:
    """Decode steps over the first B = `rows` rows of a cache. IO bindings are made once for each B."""

    def __init__(self, engine: Engine, cache: KVCache, rows: int) -> None:
        self._engine, self._cache, self._rows = engine, cache, rows
        if rows not in cache.memory.bound:
            cache.memory.bound[rows] = engine._bind_steps(cache, rows)
        self._bound: Steps = cache.memory.bound[rows]

    @property
    def has_candidates(self) -> bool:
        """Whether `step_candidates` copies less to the host than `step`."""
        return self._bound.has_candidates

    def step(self, tokens: np.ndarray, running: np.ndarray) -> np.ndarray:
        """tokens [B] int64, running [B] bool -> logits [B, V] fp32, valid until the next step.

        Idle rows are computed too; their results are ignored. Their lengths do not grow, but their windowed caches
        may drop positions, so they must be prefilled again.
        """
        self._advance(tokens, running)
        return self._bound.logits()

    def step_greedy(self, tokens: np.ndarray, running: np.ndarray) -> np.ndarray:
        """Like `step`, but returns the argmax [B] int64, computed on the device.

        Raises:
            ProviderError: the largest logit of a running row is not finite.
        """
        self._advance(tokens, running)
        tokens, largest = self._bound.greedy()
        self._check_finite(largest, running)
        return tokens

    def step_candidates(self, tokens: np.ndarray, running: np.ndarray, count: int) -> list[Chosen]:
        """Like `step`, but returns for each row ascending ids and their logits, among them the `count` largest and
        their ties.

        Raises:
            ProviderError: the largest logit of a running row is not finite.
        """
        self._advance(tokens, running)
        self._check_finite(self._bound.greedy()[1], running)
        return self._bound.candidates(count)

    @staticmethod
    def _check_finite(largest: np.ndarray, running: np.ndarray) -> None:
        if not np.isfinite(largest[running]).all():
            raise no_token(float(largest[running][~np.isfinite(largest[running])][0]))

    def _advance(self, tokens: np.ndarray, running: np.ndarray) -> None:
        engine, bound = self._engine, self._bound
        lengths = self._cache.lengths[: self._rows].copy()
        try:
            engine._run(bound.binding, tokens[:, None], engine._embed(tokens)[:, None], lengths, bound.mask_length)
        finally:
            self._cache.lengths[: self._rows][running] = lengths[running]


def _mask(lengths: np.ndarray, columns: int | None) -> np.ndarray:
    """A mask whose row sums are `lengths`; `columns` None: as few as needed."""
    return (np.arange(lengths.max() if columns is None else columns) < lengths[:, None]).astype(np.int64)
