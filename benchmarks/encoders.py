"""The full-size encoders beside timm's and transformers' own, or those of another precision: latency, memory, real-time
factor, error.

Makes a checkpoint whose encoders are those of E2B and E4B (and whose decoder is a stub), exports it, and lets two
processes take turns on as many threads each: ONNX Runtime, and torch eager or ONNX Runtime with another precision.
Needs the tests' oracles (`bash ci/install.sh`), about 12 GB of disk and 12 GiB of memory:

    python benchmarks/encoders.py --workdir DIR [--rounds 5] [--precision fp32] [--beside torch]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from gemma3n_onnx.runtime.system import peak_memory_bytes, private_memory_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
# A decoder of the real width, and otherwise as small as one can be.
STUB_DECODER = {
    "vocab_size": 1280,
    "vocab_size_per_layer_input": 1024,
    "num_hidden_layers": 3,
    "num_kv_shared_layers": 1,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "intermediate_size": 32,
}
IMAGE_SIZES = (256, 512, 768)
CLIP_SECONDS = (1.0, 5.3, 30.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--beside", default="torch", help="torch, or a precision")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    checkpoint, artifact = arguments.workdir / "encoders", arguments.workdir / f"encoders-{arguments.precision}"
    prepare(checkpoint, artifact, arguments.precision)
    beside = ("torch", checkpoint)
    if arguments.beside != "torch":
        beside = ("onnxruntime", arguments.workdir / f"encoders-{arguments.beside}")
        prepare(checkpoint, beside[1], arguments.beside)
    flops = matrix_product_rate()
    print(f"fp32 matrix products: {flops / 1e9:.0f} GFLOP/s", flush=True)
    for encoder, cases in (("vision", IMAGE_SIZES), ("audio", CLIP_SECONDS)):
        ours, theirs = Worker("onnxruntime", encoder, artifact), Worker(beside[0], encoder, beside[1])
        for case in cases:
            compare(ours, theirs, encoder, case, arguments.rounds, flops)
        for worker in (ours, theirs):
            print(encoder, worker.name, json.dumps(worker.close()), flush=True)


def prepare(checkpoint: Path, artifact: Path, precision: str) -> None:
    from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
    from gemma3n_onnx.export.checkpoint.make_checkpoint import make_checkpoint
    from gemma3n_onnx.export.pipeline import ExportOptions, export
    from gemma3n_onnx.export.progress import TerminalProgress

    if not checkpoint.exists():
        make_checkpoint("e2b", checkpoint, overrides=STUB_DECODER)
    if not artifact.exists():
        with TerminalProgress() as progress:
            summary = export(Checkpoint.open(checkpoint), artifact, ExportOptions(precision=precision), progress)
        print(f"exported in {summary.seconds:.0f} s", flush=True)


def compare(ours: Worker, theirs: Worker, encoder: str, case: float, rounds: int, flops_per_second: float) -> None:
    """Alternates the two, after one run each that is not counted; prints medians, ratio, error and the limit."""
    features = [worker.run(case)["features"] for worker in (ours, theirs)]
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for worker, times in zip((ours, theirs), seconds):
            times.append(worker.run(case)["seconds"])
    mine, other = map(median, seconds)
    one, two = map(np.load, features)
    figures = {
        ("pixels" if encoder == "vision" else "seconds of sound"): case,
        f"{ours.name}_s": round(mine, 3),
        f"{theirs.name}_s": round(other, 3),
        "speedup": round(other / mine, 2),
        "error_of_range": float(f"{np.abs(one - two).max() / np.ptp(two):.2e}"),
    }
    if theirs.kind == "torch":
        flops = theirs.run(case, count=True)["flops"]
        figures |= {"limit_s": round(flops / flops_per_second, 3), "gflop": round(flops / 1e9)}
    if encoder == "audio":
        figures["real_time_factor"] = round(mine / case, 4)
    print(encoder, json.dumps(figures), flush=True)


class Worker:
    """One contestant in a process of its own, so that its memory can be told."""

    def __init__(self, kind: str, encoder: str, folder: Path) -> None:
        self.kind, self.name = kind, f"{kind}-{folder.name}"
        command = [sys.executable, __file__, "--worker", kind, encoder, str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, case: float, **options: bool) -> dict[str, Any]:
        return self._ask({"case": case, **options})

    def close(self) -> dict[str, Any]:
        memory = self._ask({"memory": True})
        self._process.communicate()
        return memory

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def work(kind: str, encoder: str, folder: Path) -> None:
    """Answers questions on stdin until it is closed."""
    started = time.perf_counter()
    run = {"onnxruntime": load_ours, "torch": load_torch}[kind](encoder, folder)
    loaded = time.perf_counter() - started
    for line in sys.stdin:
        question = json.loads(line)
        if "memory" in question:
            sizes = {"peak_mib": peak_memory_bytes(), "private_mib": private_memory_bytes()}
            answer = {"load_s": round(loaded, 2), **{name: (size or 0) >> 20 for name, size in sizes.items()}}
        else:
            answer = measure(run, encoder, question["case"], count=question.get("count", False))
            answer["features"] = str(folder.parent / f"{kind}-{folder.name}-{encoder}.npy")
            np.save(answer["features"], answer.pop("output"))
        print(json.dumps(answer), flush=True)


def measure(run: Callable[..., np.ndarray], encoder: str, case: float, *, count: bool) -> dict[str, Any]:
    inputs = pixels(int(case)) if encoder == "vision" else clip(case)
    if count:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            output = run(*inputs)
        return {"flops": counter.get_total_flops(), "output": output}
    started = time.perf_counter()
    output = run(*inputs)
    return {"seconds": time.perf_counter() - started, "output": output}


def load_ours(encoder: str, folder: Path) -> Callable[..., np.ndarray]:
    from gemma3n_onnx.runtime.artifact import load_manifest
    from gemma3n_onnx.runtime.engine.encoders import Encoders
    from gemma3n_onnx.runtime.engine.providers.select import select_provider

    manifest = load_manifest(folder)
    encoders = Encoders(folder, manifest, select_provider("cpu", manifest))
    names = [tensor.name for tensor in manifest.encoders[encoder].graph.inputs]
    return lambda *inputs: encoders.features(encoder, dict(zip(names, inputs)))


def load_torch(encoder: str, folder: Path) -> Callable[..., np.ndarray]:
    """timm's or transformers' encoder with transformers' embedder, in fp32."""
    from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
    from gemma3n_onnx.export.verify.reference import load_encoder

    return load_encoder(Checkpoint.open(folder), encoder)


def pixels(size: int) -> tuple[np.ndarray]:
    return (np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32),)


def clip(seconds: float) -> tuple[np.ndarray, np.ndarray]:
    from gemma3n_onnx.export.verify.encoders import random_clip
    from media import LOG_MEL

    return random_clip(LOG_MEL, seconds, np.random.default_rng(0))


def matrix_product_rate() -> float:
    """FLOP/s of fp32 matrix products of all cores: what bounds encoders, which read each weight many times."""
    a, b = (np.random.default_rng(0).random((2048, 2048), dtype=np.float32) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * 2048**3 / best


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    else:
        main()
