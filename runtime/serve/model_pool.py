"""The models that a server offers, by name. Each is loaded on first use; all share one memory budget."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from gemma3n_onnx.runtime.artifact import BYTES_PER_VALUE, MANIFEST, CacheInfo, Manifest, fingerprint, load_manifest
from gemma3n_onnx.runtime.constraints.grammar import Grammars
from gemma3n_onnx.runtime.engine.kv_cache import cache_capacity
from gemma3n_onnx.runtime.engine.providers.select import AUTO, provider_of, select_provider
from gemma3n_onnx.runtime.engine.scorer import scorer_caches, scorer_capacity, second_weights_bytes
from gemma3n_onnx.runtime.errors import ArtifactError, Gemma3nError, OptionError, ProviderError
from gemma3n_onnx.runtime.generation.defaults import SamplingDefaults
from gemma3n_onnx.runtime.generation.scheduler import Counts
from gemma3n_onnx.runtime.hub import find_artifact
from gemma3n_onnx.runtime.model import OnnxGemma3n

from .not_found import UnknownModelError
from .worker import BusyError, ModelWorker, ShutdownError

# Names that clients send when the user has chosen no model.
ANY_MODEL = ("", "default", "ignore", "none")
CONTEXT = 4096


@dataclass(frozen=True)
class ServeOptions:
    """Limits of a server.

    Attributes:
        rows: sequences that each model generates at once.
        context: tokens of one sequence, prompt and answer; None for `CONTEXT`, or what a model has if that is less.
        queue: sequences of each model that may wait for a row.
        prefix_cache_size: prompts of each model whose KV caches are kept for reuse.
        memory_budget: bytes for all loaded models; None for no limit.
        clamp_max_tokens: whether a request that asks for more tokens than fit into the context gets what fits, or is
            refused.
        control_tokens: whether the spelling of a control token in a message becomes that token.
        sampling: fields of `SamplingDefaults` that take the place of the checkpoint's.
    """

    rows: int = 4
    context: int | None = None
    queue: int = 64
    prefix_cache_size: int = 2
    memory_budget: int | None = None
    clamp_max_tokens: bool = True
    control_tokens: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        SamplingDefaults(**self.sampling)
        for name, least in (("rows", 1), ("context", 1), ("queue", 1), ("prefix_cache_size", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise OptionError(f"--{name.replace('_', '-')} is {value}; give at least {least}.")


@dataclass
class Served:
    """A loaded model, in use by `users` requests. `sampling`: the values of requests that give none, the server's own
    before the checkpoint's. `bytes` include the scorer's memory once it `scores`."""

    name: str
    model: OnnxGemma3n
    worker: ModelWorker
    grammars: Grammars
    options: ServeOptions
    sampling: SamplingDefaults
    bytes: int
    scores: bool = False
    used: float = field(default_factory=time.monotonic)
    users: int = 0


class ModelPool:
    """`folders`: also Hub ids, as paths. `load`: arguments of `OnnxGemma3n.from_pretrained`. `aliases`: further names
    of models, as "alias" if one model is served, else as "name=alias".

    Raises:
        ArtifactError: a folder is not an artifact, two folders have the same name, or a download failed.
        OptionError: an alias names no model, or is another model's name; the context is longer than a model's; an
        unknown provider. ProviderError: the provider is not installed, or cannot run a model.
    """

    def __init__(
        self, folders: list[Path], options: ServeOptions, load: Mapping[str, Any], aliases: Sequence[str] = ()
    ) -> None:
        self._options, self._load = options, dict(load)
        self.folders: dict[str, Path] = {}
        self.manifests: dict[str, Manifest] = {}
        for given in folders:
            name, folder = _name_of(given), find_artifact(given)
            manifest = self._read(name, folder)
            if name in self.folders:
                raise ArtifactError(f"{self.folders[name]} and {folder} have the same name; rename one.")
            self.folders[name], self.manifests[name] = folder, manifest
        if not self.folders:
            raise ArtifactError("No artifact to serve; pass folders that gemma3n-export wrote.")
        self._fingerprints = {name: fingerprint(folder, self.manifests[name]) for name, folder in self.folders.items()}
        self._names = _names(self.folders, aliases)
        self.started = int(time.time())
        self.loaded: dict[str, Served] = {}
        self._unloaded: dict[str, Counts] = {}
        """Totals of unloaded models, by name."""
        self._loading: dict[str, int] = {}
        """Bytes reserved for models that are loading, by name."""
        self._changed = threading.Condition(threading.RLock())

    @property
    def names(self) -> list[str]:
        """Every name that a request may use, beside those for any model."""
        return [*self._names]

    def resolve(self, name: str) -> str:
        """The name of the model that a request means, which may add ":latest". Where one model is served, an empty
        name and those of `ANY_MODEL` mean it, too. Raises UnknownModelError: no model of this name."""
        found = self._names.get(name) or self._names.get(name.removesuffix(":latest"))
        if found is None and len(self.folders) == 1 and name in ANY_MODEL:
            (found,) = self.folders
        if found is None:
            raise UnknownModelError(f"Model {name[:100]!r} is not served here; available: {', '.join(self._names)}.")
        return found

    def manifest(self, name: str) -> Manifest:
        """Raises UnknownModelError: no model of this name."""
        return self.manifests[self.resolve(name)]

    def context_of(self, name: str) -> int:
        """Tokens of one sequence. Raises UnknownModelError: no model of this name."""
        return self._options.context or min(CONTEXT, self.manifest(name).max_context)

    def preload(self) -> None:
        """Loads every model.

        Raises:
            OptionError: the memory budget does not hold all of them. ArtifactError, ProviderError: as of `acquire`.
        """
        needed = sum(self._size_of(name) for name in self.folders)
        if (budget := self._options.memory_budget) is not None and needed > budget:
            raise OptionError(
                f"The models need {needed / 1e9:.2f} GB and --models-memory is {budget / 1e9:.2f}; give more, or leave "
                "out --preload."
            )
        for name in self.folders:
            self.release(self.acquire(name))

    def acquire(self, name: str) -> Served:
        """Returns the model, loaded, until `release`. Unloads idle models to make room.

        While one model loads, others can be acquired and released. A model whose artifact was replaced loads again.

        Raises:
            UnknownModelError: no model of this name. BusyError: models in use fill the memory budget, or the model is
            in use and its artifact was replaced. ArtifactError, ProviderError: the model cannot be loaded.
        """
        name = self.resolve(name)
        self._notice_change(name)
        size = self._size_of(name)
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
            served = self._load_model(name, size)
            with self._changed:
                self.loaded[name] = served
                self.retain(served)
        finally:
            with self._changed:
                del self._loading[name]
                self._changed.notify_all()
        return served

    def reserve_scorer(self, served: Served) -> None:
        """Adds the memory of the scorer, which loads at the first use, to an acquired model's. Unloads idle models to
        make room.

        Raises:
            BusyError: models in use fill the memory budget. ProviderError: the budget is too small for this model's.
        """
        budget, context = self._options.memory_budget, self.context_of(served.name)
        size = scorer_bytes(self.manifests[served.name], context)
        with self._changed:
            if served.scores:
                return
            if budget is not None and served.bytes + size > budget:
                raise ProviderError(
                    f"Scoring text with {served.name} takes {(served.bytes + size) / 1e9:.3g} GB, but the memory for "
                    f"all models is {budget / 1e9:.3g} GB; raise --models-memory, or leave echo or logprobs out."
                )
            idle = self._make_room(size)
            removed = sum(each.bytes for each in idle)
            served.bytes, served.scores = served.bytes + size + removed, True
        try:
            while idle:
                self._unload(idle.pop())
        finally:
            with self._changed:
                served.bytes -= removed

    def retain(self, served: Served) -> None:
        """Adds a user to a model that is already acquired. Never blocks."""
        self._count(served, 1)

    def release(self, served: Served) -> None:
        self._count(served, -1)

    def unload(self, name: str) -> bool:
        """Frees a model's memory; False if it is not loaded.

        Raises:
            UnknownModelError: no model of this name. BusyError: requests are using it.
        """
        name = self.resolve(name)
        with self._changed:
            if name in self._loading or (served := self.loaded.get(name)) is None:
                return False
            if served.users:
                raise BusyError(f"{served.users} requests are using {name}; unload it when they have ended.")
            del self.loaded[name]
        self._unload(served)
        return True

    def release_encoders(self, name: str) -> bool:
        """Frees a loaded model's encoders, which load again when needed; False if it is not loaded."""
        served = self.loaded.get(self.resolve(name))
        if served is None:
            return False
        for encoder in served.model.manifest.encoders:
            served.model.release(encoder)
        return True

    def counts(self) -> dict[str, Counts]:
        """Totals per model name, including unloaded models."""
        with self._changed:
            totals = dict(self._unloaded)
            for name, served in self.loaded.items():
                totals[name] = totals.get(name, Counts()) + served.worker.counts
        return totals

    def close(self) -> None:
        """Unloads every model, with `ShutdownError` for its requests; then those that are still loading."""
        while True:
            with self._changed:
                loaded = [*self.loaded.values()]
                self.loaded.clear()
                if not loaded:
                    if not self._loading:
                        return
                    self._changed.wait()
            while loaded:
                self._unload(loaded.pop(), ShutdownError())

    def _unload(self, served: Served, end: Gemma3nError | None = None) -> None:
        served.worker.close(end or ProviderError("The model was unloaded; send the request again."))
        with self._changed:
            self._unloaded[served.name] = self._unloaded.get(served.name, Counts()) + served.worker.counts

    def _count(self, served: Served, change: int) -> None:
        with self._changed:
            served.users += change
            served.used = time.monotonic()

    def _size_of(self, name: str) -> int:
        return estimated_bytes(self.manifests[name], self._options.rows, self.context_of(name))

    def _read(self, name: str, folder: Path) -> Manifest:
        """The manifest of an artifact that can be served; raises as the pool does."""
        manifest, context = load_manifest(folder), self._options.context or 0
        if manifest.logits != "last":
            raise ArtifactError(f"{folder} returns logits of all positions; export it with --logits last to serve it.")
        if context > manifest.max_context:
            raise OptionError(
                f"--context is {context:,}, but {name} takes {manifest.max_context:,} tokens; give at most that."
            )
        select_provider(self._load.get("provider", AUTO), manifest)
        return manifest

    def _notice_change(self, name: str) -> None:
        """Unloads a model whose artifact was replaced, and reads the new manifest."""
        folder = self.folders[name]
        if fingerprint(folder, self.manifests[name]) == self._fingerprints[name]:
            return
        manifest = self._read(name, folder)
        found = fingerprint(folder, manifest)
        with self._changed:
            if name in self._loading or found == self._fingerprints[name]:
                return
            if (served := self.loaded.get(name)) is not None and served.users:
                raise BusyError(
                    f"{name} was replaced on the disk and is in use; try again when its requests have ended."
                )
            self.loaded.pop(name, None)
            self.manifests[name], self._fingerprints[name] = manifest, found
        if served is not None:
            self._unload(served)

    def _load_model(self, name: str, size: int) -> Served:
        options, context, folder = self._options, self.context_of(name), self.folders[name]
        model = OnnxGemma3n.from_pretrained(folder, prefix_cache_size=0, **self._load)
        if fingerprint(folder, self.manifests[name]) != self._fingerprints[name]:
            model.close()
            raise BusyError(f"{name} was replaced on the disk while it was loaded; try again.")
        worker = ModelWorker(model, options.rows, context, options.queue, options.prefix_cache_size)
        sampling = replace(model.sampling, **options.sampling)
        return Served(name, model, worker, model.options.constraints.grammars, options, sampling, size)

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


def _name_of(folder: Path) -> str:
    """A relative folder inside the current one, or a Hub id, as it was given, such as google/gemma-3n-E4B-it; else its
    last part."""
    if folder.parts and not folder.is_absolute() and ".." not in folder.parts:
        return folder.as_posix()
    return folder.resolve().name if folder.name in ("", "..") else folder.name


def _names(folders: Mapping[str, Path], aliases: Sequence[str]) -> dict[str, str]:
    """The model that each name means; the last part of a name does, too, if it is no other model's."""
    names = {name: name for name in folders}
    for given in aliases:
        name, equals, alias = given.partition("=")
        if not equals and len(folders) == 1:
            (name,), alias = folders, given
        if name not in folders or not alias:
            raise OptionError(
                f"The alias {given!r} names no served model; write NAME=ALIAS, NAME of {', '.join(folders)}."
            )
        if names.setdefault(alias, name) != name:
            raise OptionError(f"The alias {alias!r} is another model's name; choose another one.")
    shorts = Counter(PurePosixPath(name).name for name in folders)
    for name in folders:
        if shorts[short := PurePosixPath(name).name] == 1:
            names.setdefault(short, name)
    return names


def estimated_bytes(manifest: Manifest, rows: int, context: int) -> int:
    """Estimated memory of a model: graph weights without the tables, and KV caches."""
    tables = {manifest.token_embeddings.file, manifest.per_layer_embeddings.file}
    weights = sum(info.bytes for name, info in manifest.files.items() if name not in tables)
    return max(weights, manifest.step_bytes) + rows * _cache_bytes(manifest.caches, manifest, context)


def scorer_bytes(manifest: Manifest, context: int) -> int:
    """Estimated memory of a model's scorer: weights that it does not share with the decoder, and KV caches."""
    caches = _cache_bytes(scorer_caches(manifest), manifest, scorer_capacity(context))
    return second_weights_bytes(manifest) + caches


def _cache_bytes(caches: Sequence[CacheInfo], manifest: Manifest, context: int) -> int:
    """Of one row."""
    provider = provider_of(manifest)
    return sum(
        2 * c.kv_heads * c.head_dim * BYTES_PER_VALUE[c.dtype] * cache_capacity(c, provider, context) for c in caches
    )


def artifacts_in(folder: Path) -> list[Path]:
    """Artifacts directly inside `folder`, sorted by name. Raises ArtifactError if the folder does not exist."""
    if not folder.is_dir():
        raise ArtifactError(f"No such folder: {folder}; pass one that contains artifacts.")
    return sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
