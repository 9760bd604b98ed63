"""Writes export/cuda_kernels.txt: the operators, with their types, that ONNX Runtime has CUDA kernels for in artifacts.

    python ci/cuda_dry_run/kernels.py PLACEMENTS ARTIFACT...

PLACEMENTS: the folder that `bash ci/cuda_dry_run/run.sh --record PLACEMENTS ARTIFACT...` wrote.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnx_ir as ir

from gemma3n_onnx.export import operator_placement as placement

TABLE = Path(__file__).parents[2] / "export" / "cuda_kernels.txt"
HEAD = "# What the CUDA provider of onnxruntime-gpu 1.31.1 took of this project's graphs: domain, operator, types.\n"


def main() -> None:
    folder, *artifacts = map(Path, sys.argv[1:])
    lines = set()
    for artifact in artifacts:
        for file in folder.glob(f"{artifact.name}.*.json"):
            on_device = json.loads(file.read_text())
            model = ir.load(artifact / f"{file.suffixes[-2][1:]}.onnx")
            types = placement.dtypes_of(model)
            whole = any(name.startswith("*") for name in on_device)
            lines |= {placement.signature(node, types) for node in model.graph if whole or node.name in on_device}
    TABLE.write_text(HEAD + "".join(f"{line}\n" for line in sorted(lines)), encoding="utf-8")


if __name__ == "__main__":
    main()
