"""Speed and memory beside llama.cpp and OpenVINO: the same random weights, threads and prompts, alternating runs.

    bash benchmarks/compare/setup.sh DIR          (the peers' environments; builds llama.cpp)
    python benchmarks/compare/run.py --workdir DIR [--precision int4] [--threads 2] [--rounds 5]

Needs about 40 GB of disk and 24 GiB of memory. The checkpoint, the artifact and the peers' files are made in DIR once
and stay there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from gemma3n_onnx.runtime.artifact import load_manifest
from gemma3n_onnx.runtime.cli.measure import read_bandwidth, read_bytes

HERE = Path(__file__).parent
OURS = ("ours", "ours, prefill shared")
PEERS = ("llama.cpp", "OpenVINO")
PROMPTS = (128, 1024)
NEW_TOKENS = 32
CONTEXT = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--size", default="e2b")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    arguments = parser.parse_args()
    artifact = made(arguments.workdir, arguments.size, arguments.precision, arguments.peers)
    ours_on = [sys.executable, HERE / "ours.py", artifact, arguments.threads, CONTEXT]
    commands = {
        "ours": ours_on,
        "ours, prefill shared": [*ours_on, 0],
        "llama.cpp": [
            arguments.workdir / "llama/bin/python",
            HERE / "llama.py",
            arguments.workdir / f"{arguments.size}.q4_0.gguf",
            arguments.threads,
            CONTEXT,
        ],
        "OpenVINO": [
            arguments.workdir / "openvino/bin/python",
            HERE / "ov.py",
            arguments.workdir / f"{arguments.size}-openvino",
            arguments.threads,
        ],
    }
    contestants = {name: Process(list(map(str, commands[name]))) for name in (*OURS, *arguments.peers)}
    rng = np.random.default_rng(0)
    bandwidth: list[float] = []
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for number in range(arguments.rounds + 1):
        for length in PROMPTS:
            ids = [2, *rng.integers(1000, 200_000, length - 1).tolist()]
            for name, contestant in contestants.items():
                told = contestant.ask(ids)
                print(number, length, name, json.dumps({k: v for k, v in told.items() if k != "tokens"}), flush=True)
                if number:  # the first round warms up
                    found.setdefault((name, length), []).append(told)
        bandwidth.append(read_bandwidth(arguments.threads))
    report(found, contestants, statistics.median(bandwidth), artifact)


def made(folder: Path, size: str, precision: str, peers: Collection[str]) -> Path:
    """Makes what is not there yet; returns our artifact."""
    checkpoint, artifact = folder / size, folder / f"{size}-{precision}"
    if not checkpoint.exists():
        ours("runtime.cli.main", "make-checkpoint", "--size", size, "--text-only", "--output", checkpoint)
    if not artifact.exists():
        ours("export.cli.main", "--model", checkpoint, "--precision", precision, "--output", artifact)
    if "llama.cpp" in peers and not (file := folder / f"{size}.q4_0.gguf").exists():
        run(folder / "llama/bin/python", HERE / "write_gguf.py", checkpoint, file)
    if "OpenVINO" in peers and not (model := folder / f"{size}-openvino").exists():
        options = ["--weight-format", "int4", "--group-size", "128", "--group-size-fallback", "ignore"]
        task = ["--task", "text-generation-with-past"]
        run(folder / "openvino/bin/optimum-cli", "export", "openvino", "--model", checkpoint, *task, *options, model)
    return artifact


def ours(module: str, *arguments: object) -> None:
    run(sys.executable, "-c", f"from gemma3n_onnx.{module} import main; main()", *arguments)


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


class Process:
    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.load_seconds = self._answer()["load_seconds"]

    def ask(self, ids: list[int]) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps({"ids": ids, "new_tokens": NEW_TOKENS}), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"{self._process.args!r} ended with {self._process.wait()}")
        return json.loads(line)


def report(
    found: dict[tuple[str, int], list[dict[str, Any]]],
    contestants: dict[str, Process],
    bandwidth: float,
    artifact: Path,
) -> None:
    """Medians, and how many times as fast ours is."""
    print(f"\nread bandwidth {bandwidth / 1e9:.1f} GB/s")
    print("| prompt | contestant | prefill tok/s | decode tok/s | prefill, ours / it | decode, ours / it | load s "
          "| private MB | mapped MB |")  # fmt: skip
    print("| ---: | --- |" + " ---: |" * 7)
    for length in PROMPTS:
        speeds = {name: speeds_of(found[name, length], length) for name in contestants}
        for name, (prefill, decode) in speeds.items():
            ratios = [speeds["ours"][i] / speed for i, speed in enumerate((prefill, decode))]
            last = found[name, length][-1]
            print(
                f"| {length} | {name} | {prefill:.1f} | {decode:.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} | "
                f"{contestants[name].load_seconds:.1f} | {last['private_bytes'] / 1e6:.0f} | "
                f"{last['mapped_bytes'] / 1e6:.0f} |"
            )
        limit = bandwidth / read_bytes(load_manifest(artifact), length + NEW_TOKENS // 2)
        share = speeds["ours"][1] / limit
        print(f"| {length} | memory's limit for ours | | {limit:.2f} | | {share:.2f} | | | |")


def speeds_of(runs: list[dict[str, Any]], length: int) -> tuple[float, float]:
    """Tokens a second of prefill and of decode."""
    prefill, decode = (statistics.median(run[f"{part}_seconds"] for run in runs) for part in ("prefill", "decode"))
    return length / prefill, NEW_TOKENS / decode


if __name__ == "__main__":
    main()
