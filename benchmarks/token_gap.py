"""How long a running answer of `gemma3n serve` pauses while a picture of 768 pixels and 30 s of sound arrive.

    python benchmarks/token_gap.py ARTIFACT [--rounds 3] [--new-tokens 3000] [--command "python -m ..."]

Streams a long answer, first alone, then while another client sends the picture and a third one the clip. Prints the
longest time between two tokens of the stream, and how long each of the two requests took.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import shlex
import subprocess
import sys
import time
import wave
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from PIL import Image

from load import ready

PORT = 8767
OURS = f"{sys.executable} -c 'from gemma3n_onnx.runtime.cli.main import main; main()'"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=3000)
    parser.add_argument("--command", default=OURS, help="the gemma3n command, to measure another version")
    options = parser.parse_args()
    serve = ["serve", str(options.artifact), "--port", str(PORT), "--context", str(options.new_tokens + 1024)]
    server = subprocess.Popen(
        [*shlex.split(options.command), *serve], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        asyncio.run(compare(options))
    finally:
        server.terminate()
        server.wait()


async def compare(options: argparse.Namespace) -> None:
    model = options.artifact.resolve().name
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=600) as http:
        await ready(http)
        picture, clip = media_part("image_url", {"url": picture_url(0)}), media_part("input_audio", clip_data(0))
        for part in (picture, clip):
            await ask(http, model, part)  # loads the encoder
        alone, together, took = [], [], []
        for seed in range(1, options.rounds + 1):
            alone.append(max(await gaps(http, model, options.new_tokens)))
            running = asyncio.ensure_future(gaps(http, model, options.new_tokens))
            await asyncio.sleep(0.2)
            parts = media_part("image_url", {"url": picture_url(seed)}), media_part("input_audio", clip_data(seed))
            took.append(await asyncio.gather(*(ask(http, model, part) for part in parts)))
            if running.done():
                sys.exit("The answer ended before the media were read; give more --new-tokens.")
            together.append(max(await running))
    picture_s, clip_s = (median(times) for times in zip(*took))
    print(f"longest gap between two tokens, alone: {median(alone) * 1e3:.0f} ms")
    print(f"longest gap while a picture and a clip arrive: {median(together) * 1e3:.0f} ms")
    print(f"the picture's answer took {picture_s:.2f} s, the clip's {clip_s:.2f} s; medians of {options.rounds}")


async def gaps(http: httpx.AsyncClient, model: str, new_tokens: int) -> list[float]:
    """Seconds between the chunks of a streamed answer that does not end before `new_tokens`."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Count from 1 to 40."}],
        "max_tokens": new_tokens,
        "logit_bias": {"1": -100, "106": -100},
        "stream": True,
        "logprobs": True,
        "temperature": 0,
    }
    times = []
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content") is not None:
                times.append(time.perf_counter())
    return [later - earlier for earlier, later in itertools.pairwise(times[1:])]


async def ask(http: httpx.AsyncClient, model: str, part: dict[str, Any]) -> float:
    """Seconds of a request for one token about a picture or a clip."""
    content = [part, {"type": "text", "text": "What is it?"}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 1, "image_size": 768}
    started = time.perf_counter()
    response = await http.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    return time.perf_counter() - started


def media_part(kind: str, source: dict[str, Any]) -> dict[str, Any]:
    return {"type": kind, kind: source}


def picture_url(seed: int) -> str:
    """No two are alike, so that none is in the prefix cache."""
    pixels = np.random.default_rng(seed).integers(0, 256, (768, 768, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def clip_data(seed: int) -> dict[str, str]:
    samples = np.random.default_rng(seed).normal(0, 3000, 30 * 16_000).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 16_000, len(samples), "NONE", ""))
        out.writeframes(samples.tobytes())
    return {"data": base64.b64encode(file.getvalue()).decode(), "format": "wav"}


if __name__ == "__main__":
    main()
