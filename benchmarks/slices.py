"""Every published slice at full size: exported, measured, deleted; one table and one plot of all.

    python benchmarks/slices.py --workdir DIR [--precision int4] [--memory-budget GB]

Makes a random E4B checkpoint in DIR once (15 GB) and needs room for one artifact beside it. Figures are kept in DIR,
so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from commands import gemma3n, run
from gemma3n_onnx.export.slicing import load_slices
from gemma3n_onnx.runtime.cli.measure import Figures, Sizes, measure_apart, plot, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--memory-budget", type=float, help="GB, as of gemma3n bench")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    checkpoint = arguments.workdir / "e4b"
    if not checkpoint.exists():
        gemma3n("make-checkpoint", "--size", "e4b", "--text-only", "--output", checkpoint)
    budget = None if arguments.memory_budget is None else int(arguments.memory_budget * 1e9)
    kept = (
        arguments.workdir
        / f"slices-{arguments.precision}{'' if budget is None else f'-{arguments.memory_budget}'}.json"
    )
    figures = [Figures(**of) for of in json.loads(kept.read_text())] if kept.exists() else []
    for spec in load_slices().specs:
        if spec.name in {of.slice for of in figures}:
            continue
        artifact = arguments.workdir / spec.name
        if not artifact.exists():
            options = ("--slice", spec.name, "--precision", arguments.precision, "--quiet", "--output", artifact)
            run("export.cli.main", "--model", checkpoint, *options)
        load = {"provider": "cpu", "threads": arguments.threads, "memory_budget": budget}
        figures.append(measure_apart(artifact, Sizes(1024, 64, 4096), 3, load))
        kept.write_text(json.dumps([asdict(of) for of in figures], indent=1))
        print(table(figures[-1:]), flush=True)
        shutil.rmtree(artifact)
    figures.sort(key=lambda of: of.read_bytes)
    print(table(figures))
    plot(figures, kept.with_suffix(".png"))


if __name__ == "__main__":
    main()
