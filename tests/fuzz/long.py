"""Fuzzes all targets in turn for some minutes; see `ci/fuzz.sh`."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

from fuzzing import TARGETS, fuzz
from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.export.checkpoint.make_checkpoint import make_checkpoint
from gemma3n_onnx.export.options import ExportOptions
from gemma3n_onnx.export.pipeline import export
from gemma3n_onnx.export.progress import TerminalProgress
from support import SMALL

BATCH = 50


def main() -> None:
    folder, minutes, seed = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    inputs = folder / "inputs"
    if not inputs.exists():
        overrides = SMALL | {"max_position_embeddings": 2048}
        checkpoint = make_checkpoint("tiny", inputs / "checkpoint", overrides=overrides)
        export(Checkpoint.open(checkpoint), inputs / "artifact", ExportOptions(), TerminalProgress(quiet=True))
    outcomes = {name: Counter[str]() for name in TARGETS}
    failed, end = 0, time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        for name, counts in outcomes.items():
            made_of = inputs / ("checkpoint" if name == "checkpoint" else "artifact")
            report = fuzz(name, made_of, seed, BATCH, keep=folder / "cases")
            counts.update(report.outcomes)
            failed += len(report.failures)
            for number, reason in report.failures.items():
                print(f"{name} {number}: {reason}", flush=True)
        seed += BATCH
    for name, counts in outcomes.items():
        print(f"{name}: {counts.total():,} mutants, {dict(counts)}")
    print(f"next seed {seed}, {failed} failures" + (f" in {folder / 'cases'}" if failed else ""))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
