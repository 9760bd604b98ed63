"""Random changes of bytes and of JSON."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

_DEEP: Any = 0
for _ in range(150):
    _DEEP = [_DEEP]
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**12, 10**400, 0.5, -0.0, 1e-300, 1e308, math.nan, math.inf),
    *("", "x", "x" * 300, "x" * 100_000, "\ud800", "\0", "../x", "/etc/passwd", "ünï 文", "<bos>", "{{ 1 }}", "%s%n"),
    *([], {}, [[]], [None] * 1000, [0] * 10_000, {"x": {"x": {}}}, _DEEP),
)


def mutated_bytes(draw: random.Random, data: bytes) -> bytes:
    """One to four changes: flipped bits, a cut, a repetition, a removed or an inserted piece."""
    content = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(content) + 1)
        end = min(len(content), place + draw.choice((1, 2, 4, 8, 64, 1024)))
        match draw.randrange(6):
            case 0 if content:
                content[place % len(content)] ^= 1 << draw.randrange(8)
            case 1:
                del content[place:]
            case 2:
                content[place:place] = content[place:end] * draw.choice((1, 2, 100))
            case 3:
                del content[place:end]
            case 4:
                content[place:end] = draw.randbytes(end - place)
            case _:
                content[place:end] = draw.choice((b"\0", b"\xff")) * (end - place)
    return bytes(content)


def mutated_json(draw: random.Random, value: Any) -> Any:
    """One to three changes at random places."""
    whole = [copy.deepcopy(value)]
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if not (parents := _containers(whole)):
            break
        parent = draw.choice(parents)
        if isinstance(parent, dict):
            _change(draw, parent, draw.choice([*parent]), parents)
        else:
            _change(draw, parent, draw.randrange(len(parent)), parents)
    return whole[0] if whole else None


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def _containers(value: Any, depth: int = 20) -> list[Any]:
    """Every object and list that is not empty, down to a depth; of long lists only those of the first items."""
    if not isinstance(value, dict | list) or not value or not depth:
        return []
    inner = [*value.values()] if isinstance(value, dict) else value[:20]
    return [value, *(each for item in inner for each in _containers(item, depth - 1))]


def _change(draw: random.Random, parent: Any, key: Any, parents: list[Any]) -> None:
    old = parent[key]
    match draw.randrange(8):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, list):
            parent[key:key] = [copy.deepcopy(old)] * draw.choice((1, 2, 1000))
        case 1:
            parent[str(draw.choice(VALUES))[:300]] = old
        case 2 if isinstance(old, int | float) and not isinstance(old, bool):
            parent[key] = draw.choice((old + 1, old - 1, old * 2, -old, old * 1000, old // 3, str(old), [old]))
        case 2 if isinstance(old, str):
            parent[key] = mutated_bytes(draw, old.encode(errors="replace")).decode("latin-1")
        case 3:
            parent[key] = copy.deepcopy(draw.choice(parents))
        case _:
            parent[key] = copy.deepcopy(draw.choice(VALUES))
