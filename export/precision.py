"""Which precision is stored, computed in, and may run where."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ExportOptionError

TARGETS = ("cpu", "cuda")


@dataclass(frozen=True)
class Precision:
    """`storage` is the dtype of the weights on disk, `compute` that of the graph's arithmetic."""

    name: str
    storage: str
    compute: str


# ONNX Runtime 1.31: the CPU provider has no bf16 arithmetic and on x86 none in fp16 that is faster than fp32,
# so narrow weights are widened at load; GroupQueryAttention on CUDA takes fp16 and bf16 only.
_SUPPORTED = {
    ("fp32", "cpu"): Precision("fp32", storage="fp32", compute="fp32"),
    ("fp16", "cpu"): Precision("fp16", storage="fp16", compute="fp32"),
    ("bf16", "cpu"): Precision("bf16", storage="bf16", compute="fp32"),
    ("fp16", "cuda"): Precision("fp16", storage="fp16", compute="fp16"),
    ("bf16", "cuda"): Precision("bf16", storage="bf16", compute="bf16"),
}
PRECISIONS = tuple(dict.fromkeys(name for name, _ in _SUPPORTED))


def precision_for(name: str, target: str) -> Precision:
    """Raises ExportOptionError, with the precisions that the target runs, for any other combination."""
    if target not in TARGETS:
        raise ExportOptionError(f"Unknown target {target!r}; choose {' or '.join(TARGETS)}.")
    if name not in PRECISIONS:
        raise ExportOptionError(f"Unknown precision {name!r}; choose one of {', '.join(PRECISIONS)}.")
    if (found := _SUPPORTED.get((name, target))) is None:
        usable = ", ".join(p for p, t in _SUPPORTED if t == target)
        raise ExportOptionError(f"Precision {name} does not run on target {target}; choose one of {usable}.")
    return found
