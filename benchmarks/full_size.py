"""Figures at full size: makes a random E4B checkpoint, exports the E2B slice, generates, measures.

Needs about 40 GB of disk and 24 GiB of memory; takes some minutes. The figures of "Fp32 and bf16" in
docs/measurements.md come from here:

    python benchmarks/full_size.py --workdir DIR [--precision fp32] [--parity]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from gemma3n_onnx.runtime.system import mapped_memory_bytes, private_memory_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--slice", default="E2B")
    parser.add_argument("--context", type=int, default=32768, help="context of the KV measurement")
    parser.add_argument("--parity", action="store_true", help="also compare with transformers (about 14 GB)")
    arguments = parser.parse_args()
    checkpoint = arguments.workdir / "e4b"
    artifact = arguments.workdir / f"{arguments.slice}-{arguments.precision}"
    if not checkpoint.exists():
        _timed("make-checkpoint", _gemma3n("make-checkpoint", "--size", "e4b", "--output", checkpoint))
    if not artifact.exists():
        command = _python("export.cli.main", "main", "--model", checkpoint, "--slice", arguments.slice)
        _timed("export", [*command, "--precision", arguments.precision, "--output", artifact])
    for section in ("generate", "kv", "multimodal"):
        subprocess.run([sys.executable, __file__, "--section", section, artifact, str(arguments.context)], check=True)
    if arguments.parity:
        lengths = ("--prompts", "1", "--prompt-tokens", "1029", "--new-tokens", "64")
        _timed("verify", _gemma3n("verify", artifact, "--model", checkpoint, *lengths))


def generate(folder: Path) -> None:
    """Load time, speed and memory of 64 tokens after a prompt of 128; the first run reads the weights from disk."""
    from gemma3n_onnx.runtime import OnnxGemma3n
    from gemma3n_onnx.runtime.artifact import BYTES_PER_VALUE

    before = _memory()
    started = time.perf_counter()
    model = OnnxGemma3n.from_pretrained(folder, prefix_cache_size=0)
    loaded = time.perf_counter() - started
    rng = np.random.default_rng(0)
    rows = model.manifest.per_layer_embeddings.rows
    prompt = rng.integers(4, rows, 128).tolist()
    first = model.generate(prompt, max_new_tokens=1)
    result = model.generate(prompt, max_new_tokens=64)
    timings, after = result.timings, _memory()
    bandwidth = _read_bandwidth()
    values = model.manifest.parameters.effective + model.manifest.parameters.token_embeddings
    read_per_token = values * BYTES_PER_VALUE[model.manifest.compute_dtype]
    _print(
        "generate",
        load_s=round(loaded, 2),
        prefill_128_tok_s=round(timings.prefill_tokens_per_second, 1),
        first_run_time_to_first_token_s=round(first.timings.time_to_first_token, 2),
        time_to_first_token_s=round(timings.time_to_first_token, 2),
        decode_64_tok_s=round(timings.decode_tokens_per_second, 2),
        read_bandwidth_gb_s=round(bandwidth / 1e9, 1),
        decode_limit_tok_s=round(bandwidth / read_per_token, 2),
        distinct_tokens=len(set(result.token_ids)),
        anonymous_mib=round((after["private"] - before["private"]) / 2**20),
        mapped_mib=round(after["mapped"] / 2**20),
        ple_table_mib=round(_mapped(model.manifest.per_layer_embeddings.file) / 2**20, 2),
    )


def multimodal(folder: Path) -> None:
    """Time to the first token of a question about images and sound, and what the encoders take and give back."""
    from gemma3n_onnx.runtime import OnnxGemma3n

    model = OnnxGemma3n.from_pretrained(folder, prefix_cache_size=0)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (600, 800, 3), dtype=np.uint8)
    clip = (0.1 * rng.standard_normal(30 * 16_000)).astype(np.float32)
    question = {"type": "text", "text": "What is this?"}
    contents: dict[str, list[dict[str, object]]] = {"text": [question]}
    contents |= {f"image_{size}": [{"type": "image", "image": image}, question] for size in (256, 512, 768)}
    contents["audio_30_s"] = [{"type": "audio", "audio": (clip, 16_000)}, question]
    for name, content in contents.items():
        size = int(name.split("_")[1]) if name.startswith("image") else None
        messages = [{"role": "user", "content": content}]
        first, again = (model.generate(messages, max_new_tokens=1, image_size=size) for _ in range(2))
        _print(
            "multimodal",
            prompt=name,
            tokens=len(first.prompt_token_ids),
            first_run_time_to_first_token_s=round(first.timings.time_to_first_token, 2),
            time_to_first_token_s=round(again.timings.time_to_first_token, 2),
            encoder_s=round(again.timings.encoder_seconds, 2),
            encoders_loaded=model.encoders.loaded,
            anonymous_mib=round(_memory()["private"] / 2**20),
            mapped_mib=round(_memory()["mapped"] / 2**20),
        )
    model.release()
    memory = {key: round(value / 2**20) for key, value in _memory().items()}
    _print(
        "multimodal", after_release=model.encoders.loaded, anonymous_mib=memory["private"], mapped_mib=memory["mapped"]
    )


def kv(folder: Path, context: int) -> None:
    """Memory of the KV caches at `context` tokens, against full-length and window-length sums."""
    from gemma3n_onnx.runtime.artifact import BYTES_PER_VALUE, load_manifest
    from gemma3n_onnx.runtime.engine.kv_cache import CacheMemory
    from gemma3n_onnx.runtime.engine.providers.select import select_provider

    manifest = load_manifest(folder)
    row_bytes = [2 * c.kv_heads * c.head_dim * BYTES_PER_VALUE[c.dtype] for c in manifest.caches]
    ideal = sum(b * (c.window or context) for b, c in zip(row_bytes, manifest.caches))
    provider = select_provider("cpu", manifest)
    before = _memory()["private"]
    cache = CacheMemory.allocate(manifest.caches, provider, 1, context)
    for layer in cache.layers:
        for buffer in (layer.key, layer.value):
            ctypes.memset(buffer.address(0), 0, buffer.nbytes)
    measured = _memory()["private"] - before
    _print(
        "kv",
        context=context,
        caches=len(manifest.caches),
        windowed=sum(c.window is not None for c in manifest.caches),
        allocated_mib=round(cache.nbytes / 2**20, 1),
        measured_mib=round(measured / 2**20, 1),
        full_plus_window_lengths_mib=round(ideal / 2**20, 1),
        all_layers_full_length_mib=round(sum(row_bytes) * context * manifest.num_layers / len(row_bytes) / 2**20, 1),
    )


def _gemma3n(*arguments: object) -> list[str]:
    return _python("runtime.cli.main", "main", *arguments)


def _python(module: str, function: str, *arguments: object) -> list[str]:
    code = f"from gemma3n_onnx.{module} import {function}; {function}()"
    return [sys.executable, "-c", code, *map(str, arguments)]


def _timed(title: str, command: list[str]) -> None:
    """Runs a command and prints its wall time and its peak resident memory, mapped files included."""
    started = time.perf_counter()
    code = (
        "import resource, subprocess, sys; r = subprocess.run(sys.argv[1:]); "
        "print('peak_rss_mib', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024, file=sys.stderr); "
        "sys.exit(r.returncode)"
    )
    subprocess.run([sys.executable, "-c", code, *command], check=True)
    _print(title, seconds=round(time.perf_counter() - started, 1))


def _memory() -> dict[str, int]:
    """Resident bytes of this process."""
    return {"private": private_memory_bytes() or 0, "mapped": mapped_memory_bytes() or 0}


def _mapped(file: str) -> int:
    """Resident bytes of this process's mappings of one file, private or shared."""
    resident, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0] and not fields[0].endswith(":"):
            inside = line.endswith(file)
        elif inside and fields[0] == "Rss:":
            resident += int(fields[1]) * 1024
    return resident


def _read_bandwidth() -> float:
    """Bytes a second at which all cores together read memory that is in no cache."""
    from concurrent.futures import ThreadPoolExecutor
    from os import cpu_count

    cores = cpu_count() or 1
    parts = [np.ones(1 << 26, dtype=np.float32) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        best = min(_seconds(lambda: list(pool.map(np.max, parts))) for _ in range(5))
    return sum(part.nbytes for part in parts) / best


def _seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _print(title: str, **figures: object) -> None:
    print(title, json.dumps(figures), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--section"]:
        section, folder, context = sys.argv[2:5]
        if section == "kv":
            kv(Path(folder), int(context))
        else:
            {"generate": generate, "multimodal": multimodal}[section](Path(folder))
    else:
        main()
