"""The whole check of the CUDA path, on a machine that has an NVIDIA GPU:

    python benchmarks/gpu.py --workdir DIR [--size e2b] [--precisions bf16,fp16,int4]

1. The demo's E2B, exported for CUDA, against transformers: text, image and sound (`gemma3n verify`).
2. A random checkpoint of E2B's shape, exported in each precision: speed and memory with and without CUDA graphs,
   beside the bandwidth of the GPU's memory (`gemma3n bench`).
3. transformers on the same weights and GPU in bf16, eager and compiled.
4. One decode step, operator by operator, as ONNX Runtime profiles it.

Needs torch with CUDA, transformers, `pip install -e ".[cuda,export,audio]"`, and 40 GB of disk. `--provider cpu --size
tiny --target cpu --precisions fp32` goes the same way without a GPU, to try the script.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from commands import gemma3n, run

ROOT = Path(__file__).parents[1]
NEW_TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--size", default="e2b")
    parser.add_argument("--precisions", default="bf16,fp16,int4")
    parser.add_argument("--prompts", default="1024,8192", help="tokens")
    parser.add_argument("--provider", default="cuda")
    parser.add_argument("--target", default="cuda")
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    precisions = options.precisions.split(",")
    prompts = [int(count) for count in options.prompts.split(",")]
    failed = [name for name in precisions if not parity(options, name)]
    checkpoint = options.workdir / options.size
    if not checkpoint.exists():
        gemma3n("make-checkpoint", "--size", options.size, "--text-only", "--output", checkpoint)
    for precision in precisions:
        artifact = exported(options, checkpoint, precision, options.workdir / f"{options.size}-{precision}")
        for prompt in prompts:
            for graphs in ("--cuda-graphs", "--no-cuda-graphs") if options.provider == "cuda" else ("--cuda-graphs",):
                print(f"\n{precision}, {graphs}", flush=True)
                sizes = ["--prompt-tokens", prompt, "--new-tokens", NEW_TOKENS, "--context", prompt + 2 * NEW_TOKENS]
                gemma3n("bench", artifact, "--provider", options.provider, graphs, *sizes)
    for compiled in (False, True):
        transformers_figures(checkpoint, prompts, compiled, "cuda" if options.provider == "cuda" else "cpu")
    profile(options.workdir / f"{options.size}-{precisions[0]}", options.provider)
    if failed:
        sys.exit(f"no parity in {', '.join(failed)}")


def parity(options: argparse.Namespace, precision: str) -> bool:
    artifact = exported(options, ROOT / "demo", precision, options.workdir / f"demo-{precision}", "--slice", "E2B")
    print(f"\ndemo, E2B, {precision}", flush=True)
    return gemma3n("verify", artifact, "--model", ROOT / "demo", "--provider", options.provider, check=False) == 0


def exported(options: argparse.Namespace, model: Path, precision: str, output: Path, *others: str) -> Path:
    if not output.exists():
        kind = ("--precision", precision, "--target", options.target)
        run("export.cli.main", "--model", model, "--output", output, "--quiet", *kind, *others)
    return output


def transformers_figures(checkpoint: Path, prompts: list[int], compiled: bool, device: str) -> None:
    """Medians of three; compiled with a static cache and CUDA graphs."""
    import torch
    from transformers import Gemma3nForCausalLM

    model = Gemma3nForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).to(device).eval()
    options: dict[str, Any] = {"do_sample": False, "use_cache": True, "eos_token_id": None, "pad_token_id": 0}
    if compiled:
        options["cache_implementation"] = "static"
        model.forward = torch.compile(model.forward, mode="reduce-overhead")

    def seconds(ids: Any, new_tokens: int) -> float:
        return timed(lambda: model.generate(ids, min_new_tokens=new_tokens, max_new_tokens=new_tokens, **options))

    for prompt in prompts:
        ids = torch.randint(4, model.config.vocab_size_per_layer_input, (1, prompt), device=device)
        for tokens in (1, 8):  # what is compiled is compiled here
            seconds(ids, tokens)
        first = statistics.median(seconds(ids, 1) for _ in range(3))
        whole = statistics.median(seconds(ids, 1 + NEW_TOKENS) for _ in range(3))
        memory = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else float("nan")
        print(
            f"transformers {'compiled' if compiled else 'eager'}, bf16, prompt {prompt}: "
            f"first token {first:.3f} s ({prompt / first:.0f} tok/s), decode {NEW_TOKENS / (whole - first):.1f} tok/s, "
            f"{memory:.0f} MB at most so far",
            flush=True,
        )


def timed(work: Callable[[], Any]) -> float:
    import torch

    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def profile(artifact: Path, provider: str) -> None:
    """The operators of a decode step without recording, by time: of the host, from before to after each launch."""
    import onnxruntime

    from gemma3n_onnx.runtime import OnnxGemma3n

    prefix = artifact.parent / "profile"
    profiled: list[Any] = []

    class Profiled(onnxruntime.InferenceSession):
        def __init__(self, path: str, options: Any, **others: Any) -> None:
            options.enable_profiling, options.profile_file_prefix = True, str(prefix)
            super().__init__(path, options, **others)
            profiled.append(self)

    original, onnxruntime.InferenceSession = onnxruntime.InferenceSession, Profiled
    try:
        model = OnnxGemma3n.from_pretrained(artifact, provider, cuda_graphs=False, memory_budget=0)
    finally:
        onnxruntime.InferenceSession = original
    cache = model.engine.new_cache(1, 2048)
    model.engine.prefill(cache, 0, [model.manifest.bos_token_id] * 1024)
    decoder = model.engine.step_runner(cache)
    for _ in range(20):
        decoder.step_greedy(np.array([5]), np.array([True]))
    path = Path(profiled[0].end_profiling())
    events = json.loads(path.read_text())
    path.unlink()
    steps = [event for event in events if event.get("name") == "model_run"][-5:]
    spent: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in events:
        inside = any(step["ts"] <= event["ts"] < step["ts"] + step["dur"] for step in steps)
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and inside:
            spent[event["args"]["op_name"]] += event["dur"]
            count[event["args"]["op_name"]] += 1
    step_ms = statistics.median(step["dur"] for step in steps) / 1e3
    print(f"\none step of {artifact.name}: {step_ms:.2f} ms, of it in operators {sum(spent.values()) / 5e3:.2f} ms")
    for name, microseconds in spent.most_common(20):
        print(f"  {name:32} {microseconds / 5e3:7.3f} ms  {count[name] / 5:.0f} x")


if __name__ == "__main__":
    main()
