"""Log-likelihoods of texts of several lengths: speed beside prefill, and memory.

    python benchmarks/scoring.py ARTIFACT [--tokens 512 2048 8192] [--threads 2]

Each length runs in a process of its own. `scored` is the whole text, `continuation` the last four tokens of it. The
last column of memory is what the logits of all positions would take in fp32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from gemma3n_onnx.runtime import OnnxGemma3n
from gemma3n_onnx.runtime.system import peak_memory_bytes, private_memory_bytes
from gemma3n_onnx.runtime.tokens import PromptTokens

CONTINUATION = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_this_process:
        print(json.dumps(measure(options.artifact, options.tokens[0], options.threads)), flush=True)
        return
    threads = [] if options.threads is None else ["--threads", str(options.threads)]
    for tokens in options.tokens:
        command = [__file__, str(options.artifact), "--tokens", str(tokens), "--in-this-process", *threads]
        subprocess.run([sys.executable, *command], check=True)


def measure(artifact: Path, tokens: int, threads: int | None) -> dict[str, float]:
    model = OnnxGemma3n.from_pretrained(artifact, threads=threads, prefix_cache_size=0)
    engine, manifest = model.engine, model.manifest
    rng = np.random.default_rng(0)
    ids = [manifest.bos_token_id, *rng.integers(1000, manifest.vocab_size, tokens - 1).tolist()]
    cache = engine.new_cache(1, tokens)
    engine.prefill(cache, 0, ids[:64])
    cache.truncate(0, 0)
    started = time.perf_counter()
    engine.prefill(cache, 0, ids)
    prefilled = time.perf_counter() - started
    engine.release()
    del cache
    before = private_memory_bytes() or 0
    engine.score(PromptTokens(ids[:64]), 1)
    loaded = private_memory_bytes() or 0
    started = time.perf_counter()
    engine.score(PromptTokens(ids), 1)
    scored = time.perf_counter() - started
    started = time.perf_counter()
    engine.score(PromptTokens([*ids[:-CONTINUATION], *ids[:CONTINUATION]]), tokens - CONTINUATION)
    continued = time.perf_counter() - started
    return {
        "tokens": tokens,
        "prefill_tok_s": round(tokens / prefilled, 1),
        "scored_tok_s": round(tokens / scored, 1),
        "continuation_s": round(continued, 3),
        "scorer_GB": round((loaded - before) / 1e9, 2),
        "while_scoring_GB": round(((private_memory_bytes() or 0) - loaded) / 1e9, 2),
        "peak_GB": round((peak_memory_bytes() or 0) / 1e9, 2),
        "all_logits_GB": round(4 * tokens * manifest.vocab_size / 1e9, 2),
    }


if __name__ == "__main__":
    main()
