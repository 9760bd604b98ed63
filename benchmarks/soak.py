"""Many clients for a long time against `gemma3n serve`: does it stay right, small, quick and fair?

    python benchmarks/soak.py ARTIFACT [--clients 64] [--seconds 3600] [--rows 16] [--hostile 0.2]

ARTIFACT: the demo's E2B. A share of the requests is hostile: what is no JSON, an unknown model, invalid fields, half a
request, streams that are left. Every other answer is compared with the one that the server gives without load. Exits
with 1 if one differs, or if anything comes back that should not.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from load import BAD, SHAPES, answers_alone, picture, ready, start_server, user

PORT = 8768
URL = f"http://127.0.0.1:{PORT}"
CHAT = "/v1/chat/completions"
WATCH_SECONDS = 5.0
WARM_SECONDS = 60.0
ENDLESS = {"logit_bias": {"106": -100, "1": -100}, "max_tokens": 600, "stream": True}
HALF = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{{".encode()


@dataclass
class Watched:
    """The server's process at one time."""

    seconds: float
    rss_mib: float
    pss_mib: float
    descriptors: int
    threads: int


@dataclass
class Soak:
    """`wanted`: the reference answers, by question. `latencies`: seconds of whole answers. `gaps`: between chunks of
    streams. `valid`: right answers of each client."""

    name: str
    wanted: dict[str, str]
    hostile: float
    found: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    valid: Counter[int] = field(default_factory=Counter)
    watched: list[Watched] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--hostile", type=float, default=0.2, help="share of the requests")
    options = parser.parse_args()
    server = start_server(options, PORT)
    try:
        soak = asyncio.run(run(options, server.pid))
    finally:
        server.terminate()
        code = server.wait()
    report(soak, options.seconds)
    print(f"exit code after SIGTERM: {code}")
    sys.exit(any(what.startswith("WRONG") for what in soak.found) or code != 0)


async def run(options: argparse.Namespace, pid: int) -> Soak:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=URL, timeout=120, limits=limits) as http:
        await ready(http)
        name = options.artifact.resolve().name
        soak = Soak(name, await answers_alone(http, name), options.hostile)
        started = time.monotonic()
        watching = asyncio.create_task(watch(soak, pid, started))
        until = started + options.seconds
        await asyncio.gather(*(client(http, soak, i, until) for i in range(options.clients)))
        watching.cancel()
        soak.watched.append(look(pid, time.monotonic() - started))
        return soak


async def client(http: httpx.AsyncClient, soak: Soak, number: int, until: float) -> None:
    draw = random.Random(number)
    while time.monotonic() < until:
        try:
            if draw.random() < soak.hostile:
                what = await attack(http, soak, draw)
            else:
                what = await ask(http, soak, draw)
                soak.valid[number] += what == "right answers"
        except (httpx.HTTPError, OSError) as error:
            what = f"WRONG: {type(error).__name__}"
        soak.found[what] += 1


async def attack(http: httpx.AsyncClient, soak: Soak, draw: random.Random) -> str:
    """What came of one hostile request."""
    body: dict[str, Any] = {"model": soak.name, "temperature": 0, "messages": [user("What is 1 plus 1?")]}
    match draw.randrange(4):
        case 0:
            answer, status = await http.post(CHAT, content=json.dumps(body)[: draw.randrange(1, 60)]), 400
        case 1:
            change, status = draw.choice(BAD)
            answer = await http.post(CHAT, json={**body, **change})
        case 2:
            async with http.stream("POST", CHAT, json={**body, **ENDLESS}) as stream:
                async for _ in stream.aiter_lines():
                    if draw.random() < 0.2:
                        return "streams left"
            return "WRONG: an endless answer ended"
        case _:
            _, writer = await asyncio.open_connection("127.0.0.1", PORT)
            writer.write(HALF)
            await asyncio.sleep(draw.random())
            writer.close()
            return "half requests"
    return "refused" if answer.status_code == status else f"WRONG: {answer.status_code} instead of {status}"


async def ask(http: httpx.AsyncClient, soak: Soak, draw: random.Random) -> str:
    """What came of one valid request, whole or streamed, a few with a picture."""
    question = f"What is {draw.randint(1, 9)} plus {draw.randint(1, 9)}?"
    content: Any = question
    if draw.random() < 0.05:
        question, content = SHAPES, picture()
    body = {"model": soak.name, "temperature": 0, "messages": [user(content)]}
    started = time.monotonic()
    if draw.random() < 0.5:
        answer = await http.post(CHAT, json=body)
        text = answer.json()["choices"][0]["message"]["content"] if answer.status_code == 200 else answer.text
    else:
        text, times = "", []
        async with http.stream("POST", CHAT, json={**body, "stream": True}) as stream:
            async for line in stream.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    piece = event["choices"][0]["delta"].get("content") if "choices" in event else str(event)
                    if piece:
                        text += piece
                        times.append(time.monotonic())
        soak.first_tokens += [first - started for first in times[:1]]
        soak.gaps += [later - earlier for earlier, later in itertools.pairwise(times)]
    soak.latencies.append(time.monotonic() - started)
    wanted = soak.wanted[question]
    return "right answers" if text == wanted else f"WRONG: {text[:80]!r} instead of {wanted!r}"


async def watch(soak: Soak, pid: int, started: float) -> None:
    for count in itertools.count():
        seen = look(pid, time.monotonic() - started)
        soak.watched.append(seen)
        if count % 12 == 0:
            print(f"{described(seen)}, {soak.found['right answers']} right answers so far", flush=True)
        await asyncio.sleep(WATCH_SECONDS)


def look(pid: int, seconds: float) -> Watched:
    process = Path("/proc") / str(pid)
    rows = [line.split() for name in ("smaps_rollup", "status") for line in (process / name).read_text().splitlines()]
    sizes = {row[0]: int(row[1]) for row in rows if row[0] in ("Rss:", "Pss:", "Threads:")}
    descriptors = len([*(process / "fd").iterdir()])
    return Watched(seconds, sizes["Rss:"] / 1024, sizes["Pss:"] / 1024, descriptors, sizes["Threads:"])


def described(seen: Watched) -> str:
    return (
        f"{seen.seconds:.0f} s: RSS {seen.rss_mib:.0f} MiB, PSS {seen.pss_mib:.0f} MiB, "
        f"{seen.descriptors} descriptors, {seen.threads} threads"
    )


def report(soak: Soak, seconds: float) -> None:
    later = [each for each in soak.watched if each.seconds >= min(WARM_SECONDS, seconds / 2)]
    first, last = later[0], later[-1]
    print(f"from {described(first)}")
    print(f"to {described(last)}; growth of RSS {last.rss_mib / first.rss_mib - 1:+.1%}")
    print(
        f"most: {max(x.descriptors for x in soak.watched)} descriptors, {max(x.threads for x in soak.watched)} threads"
    )
    for what, values in (
        ("answers", soak.latencies),
        ("first tokens", soak.first_tokens),
        ("gaps between tokens", soak.gaps),
    ):
        print(f"{what}: {percentiles(values)}")
    valid = sorted(soak.valid.values())
    print(
        f"right answers of a client: {valid[0]} at least, {valid[len(valid) // 2]} in the middle, {valid[-1]} at most"
    )
    print(f"right answers a second: {sum(valid) / seconds:.1f}")
    print(", ".join(f"{count} {what}" for what, count in soak.found.most_common()))


def percentiles(values: Sequence[float]) -> str:
    ordered = sorted(values)
    at = {f"p{part}": ordered[min(len(ordered) * part // 100, len(ordered) - 1)] for part in (50, 95, 99)}
    named = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in at.items())
    return f"{named}, longest {ordered[-1] * 1e3:.0f} ms, of {len(ordered)}"


if __name__ == "__main__":
    main()
