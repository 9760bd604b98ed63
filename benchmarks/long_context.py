"""A prompt as long as the context, and a second one that begins with it: time, memory, first token.

python benchmarks/long_context.py ARTIFACT [--tokens 32000] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from gemma3n_onnx.runtime import OnnxGemma3n
from gemma3n_onnx.runtime.system import private_memory_bytes

QUESTION_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=32_000)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    model = OnnxGemma3n.from_pretrained(arguments.artifact, threads=arguments.threads)
    rng = np.random.default_rng(0)
    vocab = model.manifest.per_layer_embeddings.rows
    document = [model.manifest.bos_token_id, *rng.integers(1000, vocab, arguments.tokens - 1).tolist()]
    first_token = []
    for number in range(3):
        question = rng.integers(1000, vocab, QUESTION_TOKENS).tolist()
        started = time.perf_counter()
        timings = model.generate([*document, *question], max_new_tokens=8).timings
        first_token.append(timings.time_to_first_token)
        print(
            json.dumps(
                {
                    "request": number,
                    "prompt_tokens": arguments.tokens + QUESTION_TOKENS,
                    "of_them_kept": timings.cached_tokens,
                    "first_token_s": round(timings.time_to_first_token, 3),
                    "decode_tok_s": round(timings.decode_tokens / timings.decode_seconds, 1),
                    "total_s": round(time.perf_counter() - started, 1),
                    "private_GB": round((private_memory_bytes() or 0) / 1e9, 2),
                    "peak_GB": round((timings.peak_memory_bytes or 0) / 1e9, 2),
                }
            ),
            flush=True,
        )
    print(f"first token {first_token[0] / first_token[1]:.0f} and {first_token[0] / first_token[2]:.0f} times sooner")


if __name__ == "__main__":
    main()
