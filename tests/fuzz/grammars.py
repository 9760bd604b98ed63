"""Compiles random constraints of the largest sizes that are taken, and generates with them: no crash, no long work.

    python tests/fuzz/grammars.py ARTIFACT SEED COUNT

Stacks are a quarter of the runtime's or less, so that a schema which needs more fails here first.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import random
import resource
import string
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gemma3n_onnx.runtime.artifact import load_manifest
from gemma3n_onnx.runtime.constraints import deep_stack
from gemma3n_onnx.runtime.constraints.grammar import Constraint, Grammars
from gemma3n_onnx.runtime.errors import OptionError

deep_stack.STACK_BYTES //= 4
STEP_STACK_BYTES = 1 << 20
SECONDS = 3.0  # of the processor, to compile one constraint
STEPS = 24

LEVELS: list[Callable[[Any], dict[str, Any]]] = [
    lambda inner: {"items": inner},
    lambda inner: {"type": "array", "items": inner, "minItems": 1},
    lambda inner: {"type": "object", "properties": {"x": inner}},
    lambda inner: {"type": "object", "properties": {"x": inner}, "required": ["x"]},
    lambda inner: {"type": "object", "properties": {"y": {"type": "string"}, "x": inner}},
    lambda inner: {"anyOf": [inner, {"type": "null"}]},
    lambda inner: {"oneOf": [{"type": "array", "items": inner}]},
    lambda inner: {"allOf": [inner, {"type": ["object", "array", "string"]}]},
    lambda inner: {"type": "object", "additionalProperties": inner},
    lambda inner: {"type": "object", "patternProperties": {"^a": inner}},
    lambda inner: {"type": "array", "prefixItems": [inner]},
    lambda inner: {"type": "object", "dependentSchemas": {"a": inner}},
    lambda inner: {"if": {"properties": {"a": {"const": 1}}}, "then": inner},
    lambda inner: {"type": "array", "contains": inner},
]


def leaf(rng: random.Random) -> dict[str, Any]:
    low = rng.randrange(-(10**9), 10**9)
    return rng.choice(
        [
            {"type": "string"},
            {"type": "string", "maxLength": rng.randrange(1, 10**6)},
            {"type": "string", "pattern": regex(rng, 3)},
            {"type": "string", "format": rng.choice(["date-time", "uri", "email", "ipv6", "uuid", "hostname"])},
            {"type": "integer", "minimum": low, "maximum": low + rng.randrange(10**12)},
            {"type": "number", "exclusiveMinimum": low / 7, "multipleOf": rng.choice([2, 7, 997])},
            {"enum": [word(rng, 20) for _ in range(rng.randrange(1, 40))]},
            {"const": {"a": [1, {"b": word(rng, 8)}]}},
            {"type": "array", "items": {"type": "string"}, "minItems": rng.randrange(100), "uniqueItems": True},
            {"type": ["null", "boolean", "array", "object"]},
            {"not": {"type": "object"}},
            {},
        ]
    )


def word(rng: random.Random, longest: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase + 'é€\U0001f600\n"\\', k=rng.randrange(1, longest)))


def chain(rng: random.Random) -> dict[str, Any]:
    """Definitions that refer to each other, each as deep as it may be."""
    levels = rng.choices(LEVELS, k=rng.randrange(1, 4))
    count, depth = rng.randrange(1, 480), rng.randrange(1, 48)
    defs: dict[str, Any] = {"end": leaf(rng)}
    last, values = "end", 0
    for number in range(count):
        schema: dict[str, Any] = {"$ref": f"#/$defs/{last}"}
        for _ in range(depth):
            schema = rng.choice(levels)(schema)
        values += json.dumps(schema).count("{") * 2
        if values > 9000 or len(json.dumps(schema)) > 20_000:
            break
        last = f"d{number}"
        defs[last] = schema
    if rng.random() < 0.3:
        defs["end"] = {"anyOf": [defs["end"], {"type": "array", "items": {"$ref": f"#/$defs/{last}"}}]}
    return {"$ref": f"#/$defs/{last}", "$defs": defs}


def wide(rng: random.Random) -> dict[str, Any]:
    count = rng.choice([10, 300, 900, 1500])
    names = [f"n{i}" for i in range(count)]
    match rng.randrange(6):
        case 0:
            return {"type": "object", "required": names}
        case 1:
            some = [leaf(rng) for _ in range(5)]
            needed = rng.sample(names, rng.randrange(count // 2))
            return {"type": "object", "properties": {name: rng.choice(some) for name in names}, "required": needed}
        case 2:
            return {"anyOf": [{"type": "object", "properties": {n: True}, "required": [n]} for n in names]}
        case 3:
            return {"type": "array", "prefixItems": [leaf(rng) for _ in names], "minItems": count}
        case 4:
            return {"enum": [{"a": i, "b": [name]} for i, name in enumerate(names)]}
        case _:
            return {"type": "object", "patternProperties": {f"^{n}_{regex(rng, 3)}$": {} for n in names[:100]}}


def regex(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.1:
        return rng.choice(["a", "[a-z]", ".", "\\d", "\\w", "é", "[^x]", "\\s", "(?:)", "[\\u4e00-\\u9fff]"])
    inner = regex(rng, depth - 1)
    match rng.randrange(6):
        case 0:
            return f"({inner}|{regex(rng, depth - 1)})"
        case 1:
            return f"({inner}){{{rng.randrange(3)},{rng.choice([3, 50, 9999])}}}"
        case 2:
            return f"({inner})*"
        case 3:
            return f"(?={inner}){regex(rng, depth - 1)}"
        case 4:
            return "|".join([inner] * rng.randrange(1, 60))
        case _:
            return inner + regex(rng, depth - 1)


def grammar(rng: random.Random) -> str:
    count = rng.choice([3, 40, 400])

    def symbol(number: int) -> str:
        following = f"r{rng.randrange(number + 1, count + 1)}"
        terminal = f"/{regex(rng, 2).replace('/', '')}/"
        parts = [following, following, '"a"', terminal, f"({following} | )", f"{following}*"]
        return " ".join(rng.choices(parts, k=rng.randrange(1, 4)))

    back = [f'r{count}: r0? "b" | "a"'] if rng.random() < 0.5 else [f'r{count}: "a"']
    rules = [f"r{i}: {' | '.join(symbol(i) for _ in range(rng.randrange(1, 4)))}" for i in range(count)]
    lark = "\n".join(["start: r0", *rules, *back])
    return lark if rng.random() < 0.8 else "start: " + "(" * (depth := rng.randrange(9000)) + '"a"' + ")*" * depth


def constraint(rng: random.Random, grammars: Grammars) -> Callable[[], Constraint]:
    match rng.randrange(6):
        case 0 | 1:
            return partial(grammars.json_of, chain(rng))
        case 2:
            return partial(grammars.json_of, wide(rng))
        case 3:
            return partial(grammars.regex_of, regex(rng, 8)[:8192])
        case 4:
            return partial(grammars.choice_of, [word(rng, 60) for _ in range(rng.randrange(1, 2000))])
        case _:
            return partial(grammars.lark_of, grammar(rng))


def generate(made: Constraint, size: int, rng: random.Random) -> float:
    """Seconds of the longest step."""
    processor, longest = made.processor(), 0.0
    logits = np.random.default_rng(rng.randrange(2**32)).normal(size=size).astype(np.float32)
    for _ in range(STEPS):
        started = time.thread_time()
        allowed = processor.process(logits)
        if not np.isfinite(allowed).any():
            break
        processor.accept(int(np.argmax(allowed)))
        longest = max(longest, time.thread_time() - started)
        logits = np.roll(logits, 7)
    return longest


def main(folder: Path, seed: int, count: int) -> None:
    faulthandler.enable()
    manifest = load_manifest(folder)
    grammars = Grammars(folder, manifest)
    taken, slowest, longest_step = 0, 0.0, 0.0
    for number in range(seed, seed + count):
        rng = random.Random(number)
        print(f"\rseed {number}", end="", file=sys.stderr)
        make = constraint(rng, grammars)
        started = time.process_time()
        try:
            made = make()
        except OptionError:
            made = None
        seconds = time.process_time() - started
        assert seconds < SECONDS, f"seed {number} took {seconds:.1f} s"
        slowest = max(slowest, seconds)
        if made is not None:
            taken += 1
            with contextlib.suppress(OptionError):
                longest_step = max(longest_step, generate(made, manifest.vocab_size, rng))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(
        f"\n{count} constraints, {taken} taken; compiled in {slowest:.2f} s, a step in {longest_step:.2f} s, "
        f"{peak} MiB at most"
    )


if __name__ == "__main__":
    threading.stack_size(STEP_STACK_BYTES)
    arguments = (Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    failed: list[BaseException] = []

    def run() -> None:
        try:
            main(*arguments)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
