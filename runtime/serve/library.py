"""The artifacts that a server offers, by name; loaded when first asked for, within a budget of memory."""

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
from gemma3n_onnx.runtime.model import OnnxGemma3n

from .grammar import Grammars
from .scheduler import BusyError, Scheduler


class UnknownModelError(Gemma3nError, KeyError):
    """No artifact of that name is offered."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class ServeOptions:
    """Of each model: `rows` answers at once with `context` tokens each, `queue` requests that may wait, and
    `kept_prompts` whose KV caches are kept. `memory_budget`: bytes that all models together may take."""

    rows: int = 4
    context: int = 4096
    queue: int = 64
    kept_prompts: int = 2
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("context", 1), ("queue", 1), ("kept_prompts", 0)):
            if (value := getattr(self, name)) < least:
                raise OptionError(f"--{name.replace('_', '-')} is {value}; give at least {least}.")


@dataclass
class Served:
    """A model that is loaded."""

    name: str
    model: OnnxGemma3n
    scheduler: Scheduler
    grammars: Grammars
    bytes: int
    used: float = field(default_factory=time.monotonic)
    users: int = 0
    """Requests that hold it, from before they are read until they are answered."""


class Library:
    """`load`: arguments of `OnnxGemma3n.from_pretrained`.

    Raises:
        ArtifactError: a folder is no artifact, or two have one name.
    """

    def __init__(self, folders: list[Path], options: ServeOptions, load: Mapping[str, Any]) -> None:
        self._options, self._load = options, dict(load)
        self.folders: dict[str, Path] = {}
        self.manifests: dict[str, Manifest] = {}
        for folder in folders:
            manifest, name = load_manifest(folder), folder.resolve().name
            if manifest.logits != "last":
                raise ArtifactError(
                    f"{folder} gives logits of all positions; export it with --logits last to serve it."
                )
            if name in self.folders:
                raise ArtifactError(f"{self.folders[name]} and {folder} have the same name; rename one.")
            self.folders[name], self.manifests[name] = folder, manifest
        if not self.folders:
            raise ArtifactError("There is no artifact to serve; give folders that gemma3n-export wrote.")
        self.started = int(time.time())
        self.loaded: dict[str, Served] = {}
        self._loading, self._counting = threading.Lock(), threading.Lock()

    def hold(self, name: str) -> Served:
        """The model, loaded; `release` gives it back. Others that are not held are unloaded to make room.

        Raises:
            UnknownModelError: there is none of that name. BusyError: those that are held take all the memory.
            ArtifactError, ProviderError: it cannot be loaded.
        """
        if name not in self.folders:
            raise UnknownModelError(f"There is no model {name!r}; there are {', '.join(self.folders)}.")
        with self._loading:
            served = self.loaded.get(name) or self._load_model(name)
            self.hold_too(served)
            return served

    def hold_too(self, served: Served) -> None:
        """Holds a model that is held already once more; waits for nothing."""
        self._count(served, 1)

    def release(self, served: Served) -> None:
        self._count(served, -1)

    def close(self) -> None:
        with self._loading:
            while self.loaded:
                self.loaded.popitem()[1].scheduler.close()

    def _count(self, served: Served, change: int) -> None:
        with self._counting:
            served.users += change
            served.used = time.monotonic()

    def _load_model(self, name: str) -> Served:
        options, manifest = self._options, self.manifests[name]
        context = min(options.context, manifest.max_context)
        size = estimated_bytes(manifest, options.rows, context)
        self._make_room(size)
        model = OnnxGemma3n.from_pretrained(self.folders[name], kept_prompts=0, **self._load)
        scheduler = Scheduler(model, options.rows, context, options.queue, options.kept_prompts)
        self.loaded[name] = Served(name, model, scheduler, Grammars(self.folders[name], manifest), size)
        return self.loaded[name]

    def _make_room(self, size: int) -> None:
        budget = self._options.memory_budget
        if budget is None:
            return
        idle = sorted((of for of in self.loaded.values() if not of.users), key=lambda of: of.used)
        while self.loaded and sum(of.bytes for of in self.loaded.values()) + size > budget:
            if not idle:
                raise BusyError("The models that are answering take all the memory; try again later.")
            oldest = idle.pop(0)
            del self.loaded[oldest.name]
            oldest.scheduler.close()


def estimated_bytes(manifest: Manifest, rows: int, context: int) -> int:
    """What a model takes: the weights of its graphs but the tables, and KV caches."""
    tables = {manifest.token_embeddings.file, manifest.per_layer_embeddings.file}
    weights = sum(info.bytes for name, info in manifest.files.items() if name not in tables)
    provider = provider_of(manifest)
    caches = sum(
        2 * c.kv_heads * c.head_dim * BYTES_PER_VALUE[c.dtype] * cache_capacity(c, provider, context)
        for c in manifest.caches
    )
    return max(weights, manifest.step_bytes) + rows * caches


def artifacts_in(folder: Path) -> list[Path]:
    """The artifacts among the folders in `folder`, by name. ArtifactError: there is no such folder."""
    if not folder.is_dir():
        raise ArtifactError(f"There is no folder {folder}; give one that holds artifacts.")
    return sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
