"""Compares logged samples of lm-evaluation-harness with those of the first folder, and prints accuracies beside them.

    python ci/harness/compare.py FOLDER FOLDER...

Exits 1 if an item's log-likelihood or answer differs from the first folder's in a folder whose name does not say that
it is quantized.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BOUND = 1e-4
"""Of a log-likelihood, or nats where it is less than one."""
QUANTIZED = ("int4", "int8")


def main() -> None:
    first, *others = [Path(each) for each in sys.argv[1:]]
    expected, wrong = samples_of(first), False
    print(f"{first}: {summary(expected)}")
    for folder in others:
        found = samples_of(folder)
        assert found.keys() == expected.keys(), f"{folder} has {sorted(found)}"
        print(f"{folder}: {summary(found)}")
        for task in expected:
            error, differing = difference(expected[task], found[task])
            compared = f"{len(found[task])} items, largest relative difference {error:.1e}"
            print(f"  {task}: {compared}, {differing} answers differ")
            exact = not folder.name.endswith(QUANTIZED)
            wrong = wrong or (exact and (error > BOUND or differing > 0))
    sys.exit(wrong)


def samples_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The items of each task, in their order."""
    found = {}
    for path in folder.rglob("samples_*.jsonl"):
        items = [json.loads(line) for line in path.read_text().splitlines()]
        task = path.name.removeprefix("samples_").rsplit("_", 1)[0]
        found[task] = sorted(items, key=lambda item: item["doc_id"])
    return found


def summary(samples: dict[str, list[dict[str, Any]]]) -> str:
    told = []
    for task, items in sorted(samples.items()):
        for metric in ("acc", "exact_match"):
            if metric in items[0]:
                told.append(f"{task} {metric} {sum(item[metric] for item in items) / len(items):.4f}")
    return ", ".join(told)


def difference(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> tuple[float, int]:
    """The largest relative difference of two log-likelihoods, and how many answers or greedy flags differ."""
    error, differing = 0.0, 0
    for one, other in zip(expected, found, strict=True):
        assert one["doc"] == other["doc"]
        for mine, theirs in zip(flat(one["resps"]), flat(other["resps"]), strict=True):
            if isinstance(mine, float):
                error = max(error, abs(mine - theirs) / max(1, abs(mine)))
            else:
                differing += mine != theirs
    return error, differing


def flat(values: Any) -> list[Any]:
    """Numbers as floats, other leaves as they are: the harness logs numbers as text."""
    if isinstance(values, list):
        return [leaf for each in values for leaf in flat(each)]
    try:
        return [float(values)]
    except ValueError:
        return [values]


if __name__ == "__main__":
    main()
