"""Many clients at once against `gemma3n serve`: answers checked, memory watched, throughput beside that of one client.

    python benchmarks/load.py ARTIFACT [--clients 64] [--seconds 300] [--rows 16]

ARTIFACT: the demo's E2B. Some clients go in the middle of an answer, and some send what is refused. Exits with 1 if
anything comes back that should not.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from gemma3n_onnx.runtime.system import resident_memory_bytes

PICTURE = Path(__file__).parents[1] / "demo" / "picture.png"
SHAPES = "What is in the picture?"
BAD: tuple[tuple[dict[str, Any], int], ...] = (
    ({"model": "other"}, 404),
    ({"messages": [{"role": "king", "content": "x"}]}, 400),
    ({"temperature": -1}, 400),
    ({"unknown": 1}, 400),
    ({"max_tokens": 10**6}, 400),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--rows", type=int, default=16)
    options = parser.parse_args()
    server = start_server(options, 8766)
    try:
        good = asyncio.run(load(options, server.pid))
    finally:
        server.terminate()
        server.wait()
    sys.exit(not good)


def start_server(options: argparse.Namespace, port: int) -> subprocess.Popen[bytes]:
    """A server of `options.artifact` with `options.rows`, whose queue has room for twice `options.clients`."""
    code = "from gemma3n_onnx.runtime.cli.main import main; main()"
    serve = ["serve", options.artifact, "--port", port, "--rows", options.rows, "--context", 1024]
    command = [sys.executable, "-c", code, *map(str, serve), "--queue", str(2 * options.clients), "--refuse-max-tokens"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


async def load(options: argparse.Namespace, pid: int) -> bool:
    name = options.artifact.resolve().name
    found: Counter[str] = Counter()
    everyone = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url="http://127.0.0.1:8766", timeout=120, limits=everyone) as http:
        await ready(http)
        wanted = await answers_alone(http, name)
        alone = await measured(http, name, wanted, found, 1, min(20.0, options.seconds), pid)
        before = resident_mib(pid)
        together = await measured(http, name, wanted, found, options.clients, options.seconds, pid)
        after = resident_mib(pid)
        health = (await http.get("/metrics")).text
    running = [line for line in health.splitlines() if line.startswith("gemma3n_requests_")]
    print("\n".join(running))
    print(f"answers a second: {alone:.1f} with one client, {together:.1f} with {options.clients}")
    print(f"resident memory: {before:.0f} MiB before, {after:.0f} MiB after")
    print(", ".join(f"{count} {what}" for what, count in found.most_common()))
    return not any(what.startswith("WRONG") for what in found)


async def ready(http: httpx.AsyncClient) -> None:
    for _ in range(300):
        try:
            await http.get("/health")
            return
        except httpx.ConnectError:
            await asyncio.sleep(0.1)
    raise SystemExit("the server does not start")


async def measured(
    http: httpx.AsyncClient,
    name: str,
    wanted: dict[str, str],
    found: Counter[str],
    clients: int,
    seconds: float,
    pid: int,
) -> float:
    before, started = found["right answers"], time.monotonic()
    until = started + seconds
    watching = asyncio.create_task(watch(pid, found))
    await asyncio.gather(*(client(http, name, wanted, found, until, random.Random(i)) for i in range(clients)))
    watching.cancel()
    return (found["right answers"] - before) / (time.monotonic() - started)


async def watch(pid: int, found: Counter[str]) -> None:
    while True:
        await asyncio.sleep(30)
        print(f"{resident_mib(pid):.0f} MiB, {found['right answers']} right answers so far", flush=True)


async def answers_alone(http: httpx.AsyncClient, name: str) -> dict[str, str]:
    """By question; this loads the model and its encoder."""
    questions = [f"What is {a} plus {b}?" for a in range(1, 10) for b in range(1, 10)]
    found = {}
    for question, content in {**{text: text for text in questions}, SHAPES: picture()}.items():
        body = {"model": name, "temperature": 0, "messages": [user(content)]}
        answer = (await http.post("/v1/chat/completions", json=body)).raise_for_status()
        found[question] = answer.json()["choices"][0]["message"]["content"]
    return found


async def client(
    http: httpx.AsyncClient,
    name: str,
    wanted: dict[str, str],
    found: Counter[str],
    until: float,
    draw: random.Random,
) -> None:
    while time.monotonic() < until:
        try:
            found[await one(http, name, wanted, draw)] += 1
        except httpx.HTTPError as error:
            found[f"WRONG: {type(error).__name__}"] += 1


async def one(http: httpx.AsyncClient, name: str, wanted: dict[str, str], draw: random.Random) -> str:
    """What came of one request."""
    question = f"What is {draw.randint(1, 9)} plus {draw.randint(1, 9)}?"
    body: dict[str, Any] = {"model": name, "temperature": 0, "messages": [user(question)]}
    kind = draw.random()
    if kind < 0.1:
        change, status = draw.choice(BAD)
        answer = await http.post("/v1/chat/completions", json={**body, **change})
        return "refused" if answer.status_code == status else f"WRONG: {answer.status_code} instead of {status}"
    if kind < 0.2:
        endless = {"logit_bias": {"106": -100, "1": -100}, "max_tokens": 600, "stream": True}
        async with http.stream("POST", "/v1/chat/completions", json={**body, **endless}) as answer:
            async for _ in answer.aiter_lines():
                if draw.random() < 0.2:
                    return "left"
        return "WRONG: an endless answer ended"
    if kind < 0.25:
        question, body["messages"] = SHAPES, [user(picture())]
    if kind < 0.6:
        answer = await http.post("/v1/chat/completions", json=body)
        text = answer.json()["choices"][0]["message"]["content"] if answer.status_code == 200 else answer.text
    else:
        text = ""
        async with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    text += event["choices"][0]["delta"].get("content") or "" if "choices" in event else str(event)
    return "right answers" if text == wanted[question] else f"WRONG: {text[:80]!r} instead of {wanted[question]!r}"


def picture() -> list[dict[str, Any]]:
    url = "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": SHAPES}]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def resident_mib(pid: int) -> float:
    return (resident_memory_bytes(pid) or 0) / 2**20


if __name__ == "__main__":
    main()
