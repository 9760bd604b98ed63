"""The models that a server offers, by name. Each is loaded on first use; all share one memory budget."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma3n_onnx.runtime.artifact import BYTES_PER_VALUE, MANIFEST, Manifest, load_manifest
from gemma3n_onnx.runtime.engine.kv_cache import cache_capacity
from gemma3n_onnx.runtime.engine.providers.select import provider_of
from gemma3n_onnx.runtime.errors import ArtifactError, Gemma3nError, OptionError
from gemma3n_onnx.runtime.generation.scheduler import Counts
from gemma3n_onnx.runtime.model import OnnxGemma3n

from .grammar import Grammars
from .worker import BusyError, ModelWorker


class UnknownModelError(Gemma3nError, KeyError):
    """The server offers no model of this name."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class ServeOptions:
    """Limits of a server.

    Attributes:
        rows: sequences that each model generates at once.
        context: tokens of one sequence, prompt and answer.
        queue: sequences of each model that may wait for a row.
        prefix_cache_size: prompts of each model whose KV caches are kept for reuse.
        memory_budget: bytes for all loaded models; None for no limit.
        clamp_max_tokens: whether a request that asks for more tokens than fit into the context gets what fits, or is
            refused.
        control_tokens: whether the spelling of a control token in a message becomes that token.
    """

    rows: int = 4
    context: int = 4096
    queue: int = 64
    prefix_cache_size: int = 2
    memory_budget: int | None = None
    clamp_max_tokens: bool = True
    control_tokens: bool = False

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("context", 1), ("queue", 1), ("prefix_cache_size", 0)):
            if (value := getattr(self, name)) < least:
                raise OptionError(f"--{name.replace('_', '-')} is {value}; give at least {least}.")


@dataclass
class Served:
    """A loaded model, in use by `users` requests."""

    name: str
    model: OnnxGemma3n
    worker: ModelWorker
    grammars: Grammars
    options: ServeOptions
    bytes: int
    used: float = field(default_factory=time.monotonic)
    users: int = 0


class ModelPool:
    """`load`: arguments of `OnnxGemma3n.from_pretrained`.

    Raises:
        ArtifactError: a folder is not an artifact, or two folders have the same name.
    """

    def __init__(self, folders: list[Path], options: ServeOptions, load: Mapping[str, Any]) -> None:
        self._options, self._load = options, dict(load)
        self.folders: dict[str, Path] = {}
        self.manifests: dict[str, Manifest] = {}
        for folder in folders:
            manifest, name = load_manifest(folder), folder.resolve().name
            if manifest.logits != "last":
                raise ArtifactError(
                    f"{folder} returns logits of all positions; export it with --logits last to serve it."
                )
            if name in self.folders:
                raise ArtifactError(f"{self.folders[name]} and {folder} have the same name; rename one.")
            self.folders[name], self.manifests[name] = folder, manifest
        if not self.folders:
            raise ArtifactError("No artifact to serve; pass folders that gemma3n-export wrote.")
        self.started = int(time.time())
        self.loaded: dict[str, Served] = {}
        self._unloaded: dict[str, Counts] = {}
        """Totals of unloaded models, by name."""
        self._loading: dict[str, int] = {}
        """Bytes reserved for models that are loading, by name."""
        self._changed = threading.Condition(threading.RLock())

    def manifest(self, name: str) -> Manifest:
        """Raises UnknownModelError: no model of this name."""
        if name not in self.manifests:
            raise UnknownModelError(f"Model {name!r} is not served here; available: {', '.join(self.folders)}.")
        return self.manifests[name]

    def acquire(self, name: str) -> Served:
        """Returns the model, loaded, until `release`. Unloads idle models to make room.

        While one model loads, others can be acquired and released.

        Raises:
            UnknownModelError: no model of this name. BusyError: models in use fill the memory budget.
            ArtifactError, ProviderError: the model cannot be loaded.
        """
        manifest = self.manifest(name)
        context = min(self._options.context, manifest.max_context)
        size = estimated_bytes(manifest, self._options.rows, context)
        with self._changed:
            while name in self._loading:
                self._changed.wait()
            if (served := self.loaded.get(name)) is not None:
                self.retain(served)
                return served
            idle = self._make_room(size)
            self._loading[name] = size + sum(each.bytes for each in idle)
        try:
            while idle:
                self._unload(idle.pop())
            self._loading[name] = size
            served = self._load_model(name, size, context)
            with self._changed:
                self.loaded[name] = served
                self.retain(served)
        finally:
            with self._changed:
                del self._loading[name]
                self._changed.notify_all()
        return served

    def retain(self, served: Served) -> None:
        """Adds a user to a model that is already acquired. Never blocks."""
        self._count(served, 1)

    def release(self, served: Served) -> None:
        self._count(served, -1)

    def counts(self) -> dict[str, Counts]:
        """Totals per model name, including unloaded models."""
        with self._changed:
            totals = dict(self._unloaded)
            for name, served in self.loaded.items():
                totals[name] = totals.get(name, Counts()) + served.worker.counts
        return totals

    def close(self) -> None:
        """Unloads every model; waits for models that are loading."""
        with self._changed:
            while self._loading:
                self._changed.wait()
            loaded = [*self.loaded.values()]
            self.loaded.clear()
        while loaded:
            self._unload(loaded.pop())

    def _unload(self, served: Served) -> None:
        served.worker.close()
        with self._changed:
            self._unloaded[served.name] = self._unloaded.get(served.name, Counts()) + served.worker.counts

    def _count(self, served: Served, change: int) -> None:
        with self._changed:
            served.users += change
            served.used = time.monotonic()

    def _load_model(self, name: str, size: int, context: int) -> Served:
        options = self._options
        model = OnnxGemma3n.from_pretrained(self.folders[name], prefix_cache_size=0, **self._load)
        worker = ModelWorker(model, options.rows, context, options.queue, options.prefix_cache_size)
        return Served(name, model, worker, Grammars(self.folders[name], self.manifests[name]), options, size)

    def _make_room(self, size: int) -> list[Served]:
        """Removes idle models from the pool until `size` more bytes fit. The caller closes the removed ones."""
        removed: list[Served] = []
        if (budget := self._options.memory_budget) is None:
            return removed
        idle = sorted((served for served in self.loaded.values() if not served.users), key=lambda served: served.used)
        taken = sum(self._loading.values()) + sum(served.bytes for served in self.loaded.values())
        needed = taken + size - budget
        while needed > 0 and (len(removed) < len(self.loaded) or self._loading):
            if not idle:
                raise BusyError("Every model in memory is in use; try again later.")
            removed.append(idle.pop(0))
            needed -= removed[-1].bytes
        for served in removed:
            del self.loaded[served.name]
        return removed


def estimated_bytes(manifest: Manifest, rows: int, context: int) -> int:
    """Estimated memory of a model: graph weights without the tables, and KV caches."""
    tables = {manifest.token_embeddings.file, manifest.per_layer_embeddings.file}
    weights = sum(info.bytes for name, info in manifest.files.items() if name not in tables)
    provider = provider_of(manifest)
    caches = sum(
        2 * c.kv_heads * c.head_dim * BYTES_PER_VALUE[c.dtype] * cache_capacity(c, provider, context)
        for c in manifest.caches
    )
    return max(weights, manifest.step_bytes) + rows * caches


def artifacts_in(folder: Path) -> list[Path]:
    """Artifacts directly inside `folder`, sorted by name. Raises ArtifactError if the folder does not exist."""
    if not folder.is_dir():
        raise ArtifactError(f"No such folder: {folder}; pass one that contains artifacts.")
    return sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
