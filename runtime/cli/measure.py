"""Measures speed and memory of an artifact, and the decode limit that memory bandwidth sets.

The columns are those of the LiteRT community's model cards. A decode step reads every weight of the decoder and the
attended part of the KV caches, so reading them is a lower bound on its time.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma3n_onnx.runtime.artifact import BYTES_PER_VALUE, Manifest, load_manifest
from gemma3n_onnx.runtime.errors import ContextLengthError, Gemma3nError, OptionError
from gemma3n_onnx.runtime.generation.scheduler import check_context
from gemma3n_onnx.runtime.model import OnnxGemma3n
from gemma3n_onnx.runtime.system import peak_memory_bytes, private_memory_bytes

_WARM_UP_TOKENS = 256


@dataclass(frozen=True)
class Sizes:
    """`context`: capacity of the KV caches, in tokens."""

    prompt_tokens: int
    new_tokens: int
    context: int


@dataclass(frozen=True)
class Figures:
    """Medians of the runs. `private_bytes` excludes mapped files; `gpu_bytes` counts all processes, None on the CPU.

    `read_bytes`: bytes of weights and KV caches that a decode step reads, halfway through the answer. `bandwidth`:
    memory bandwidth in bytes per second, of the CPU with `threads` threads or of the GPU.
    """

    slice: str
    precision: str
    provider: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    context: int
    load_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    time_to_first_token: float
    model_bytes: int
    peak_bytes: int | None
    private_bytes: int | None
    gpu_bytes: int | None
    read_bytes: int
    bandwidth: float
    mmlu: float | None

    @property
    def decode_limit(self) -> float:
        """Tokens per second that memory bandwidth allows."""
        return self.bandwidth / self.read_bytes


def measure(folder: Path, sizes: Sizes, runs: int, load: Mapping[str, Any]) -> Figures:
    """Loads the artifact, warms it up with the start of the prompt, and measures `runs` runs. `load`: arguments of
    `OnnxGemma3n.from_pretrained`.

    Raises:
        OptionError: a size or a number of runs out of range. ContextLengthError: sizes beyond the artifact's context.
    """
    _check(load_manifest(folder), sizes, runs)
    before = private_memory_bytes()
    started = time.perf_counter()
    model = OnnxGemma3n.from_pretrained(folder, prefix_cache_size=0, **load)
    loaded = time.perf_counter() - started
    manifest, engine = model.manifest, model.engine
    used = load.get("threads") or os.cpu_count() or 1
    rng = np.random.default_rng(0)
    prompt = [manifest.bos_token_id, *rng.integers(4, manifest.per_layer_embeddings.rows, sizes.prompt_tokens - 1)]
    prompt = [int(token) for token in prompt]

    cache = engine.new_cache(1, sizes.context)
    prefill, decode = [], []
    engine.prefill(cache, 0, prompt[:_WARM_UP_TOKENS])
    for _ in range(runs):
        cache.truncate(0, 0)
        started = time.perf_counter()
        logits = engine.prefill(cache, 0, prompt)
        prefill.append(time.perf_counter() - started)
        decoder = engine.step_runner(cache)
        token = np.array([logits.argmax()])
        started = time.perf_counter()
        for _ in range(sizes.new_tokens):
            token = decoder.step_greedy(token, np.array([True]))
        decode.append(time.perf_counter() - started)
    private, after = private_memory_bytes(), peak_memory_bytes()
    return Figures(
        slice=manifest.slice,
        precision=manifest.precision,
        provider=engine.provider.name,
        threads=used,
        **asdict(sizes),
        load_seconds=loaded,
        prefill_tokens_per_second=sizes.prompt_tokens / statistics.median(prefill),
        decode_tokens_per_second=sizes.new_tokens / statistics.median(decode),
        time_to_first_token=statistics.median(prefill),
        model_bytes=sum(info.bytes for info in manifest.files.values()),
        peak_bytes=after,
        private_bytes=None if private is None or before is None else private - before,
        gpu_bytes=engine.provider.memory_used(),
        read_bytes=read_bytes(manifest, sizes.prompt_tokens + sizes.new_tokens // 2),
        bandwidth=engine.provider.bandwidth(used),
        mmlu=manifest.mmlu,
    )


def measure_apart(folder: Path, sizes: Sizes, runs: int, load: Mapping[str, Any]) -> Figures:
    """`measure` in a subprocess, whose memory is the artifact's alone."""
    _check(load_manifest(folder), sizes, runs)
    arguments = json.dumps([str(folder), asdict(sizes), runs, dict(load)])
    code = f"from {__name__} import _child; _child()"
    done = subprocess.run([sys.executable, "-c", code, arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        told = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise Gemma3nError(f"{folder} could not be measured: {told.removesuffix('.')}.")
    return Figures(**json.loads(done.stdout))


def _child() -> None:
    folder, sizes, *rest = json.loads(sys.argv[1])
    try:
        figures = measure(Path(folder), Sizes(**sizes), *rest)
    except Gemma3nError as error:
        sys.exit(str(error))
    print(json.dumps(asdict(figures)))


def _check(manifest: Manifest, sizes: Sizes, runs: int) -> None:
    for name, value in (*asdict(sizes).items(), ("runs", runs)):
        if value < 1:
            raise OptionError(f"{name} is {value}; give a positive number.", option=name)
    try:
        check_context(min(sizes.context, manifest.max_context), sizes.prompt_tokens, sizes.new_tokens)
    except ContextLengthError as error:
        raise ContextLengthError(error.spelled(lambda *_: "new_tokens"), option="new_tokens") from error
    check_context(manifest.max_context, sizes.context, 0)


def read_bytes(manifest: Manifest, tokens: int) -> int:
    """Bytes of weights, and of KV caches with `tokens` in them, that one decode step reads."""
    rows = sum(
        2 * c.kv_heads * c.head_dim * BYTES_PER_VALUE[c.dtype] * min(tokens, c.attention_window or tokens)
        for c in manifest.caches
    )
    return manifest.step_bytes + rows


def table(figures: Sequence[Figures]) -> str:
    """Aligned columns, one line for each artifact."""
    head = (
        "slice", "precision", "threads", "in", "out", "prefill tok/s", "decode tok/s", "limit tok/s", "of limit",
        "first token s", "load s", "model MB", "peak MB", "private MB", "GPU MB",
    )  # fmt: skip
    rows = [head, *map(_row, figures)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    )


def _row(figures: Figures) -> tuple[str, ...]:
    return (
        figures.slice,
        figures.precision,
        str(figures.threads),
        str(figures.prompt_tokens),
        str(figures.new_tokens),
        f"{figures.prefill_tokens_per_second:.1f}",
        f"{figures.decode_tokens_per_second:.1f}",
        f"{figures.decode_limit:.1f}",
        f"{figures.decode_tokens_per_second / figures.decode_limit:.0%}",
        f"{figures.time_to_first_token:.2f}",
        f"{figures.load_seconds:.2f}",
        *(
            "-" if n is None else f"{n / 1e6:.0f}"
            for n in (figures.model_bytes, figures.peak_bytes, figures.private_bytes, figures.gpu_bytes)
        ),
    )


def plot(figures: Sequence[Figures], path: Path) -> None:
    """Writes a PNG of speed, memory and published MMLU by slice.

    Raises:
        OptionError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise OptionError('--plot needs matplotlib; install it with: pip install "gemma3n-onnx[bench]".') from error
    panels: list[tuple[str, list[float]]] = [
        ("decode, tokens/s", [each.decode_tokens_per_second for each in figures]),
        ("prefill, tokens/s", [each.prefill_tokens_per_second for each in figures]),
        ("private memory, GB", [(each.private_bytes or 0) / 1e9 for each in figures]),
    ]
    if any(each.mmlu for each in figures):
        panels.append(("MMLU, % (published)", [each.mmlu or float("nan") for each in figures]))
    rows = range(len(figures))
    figure = Figure(figsize=(1.6 + 2.2 * len(panels), 1.3 + 0.26 * len(figures)), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels):
        axes.plot(values, rows, "o", color="#3b6ea5")
        axes.grid(axis="x", alpha=0.4)
        axes.set_title(title, fontsize=9, loc="left")
        axes.margins(x=0.12)
        axes.set_yticks(rows, [f"{each.slice} {each.precision}" for each in figures], fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
    axes.invert_yaxis()  # which all panels share
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise OptionError(f"{path} cannot be written ({error.strerror}); give another file for --plot.") from error
