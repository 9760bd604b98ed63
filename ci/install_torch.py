"""`pip install`, with PyTorch's index of CPU builds wherever it can be reached.

PyPI's torch for Linux is a CUDA build that brings gigabytes of NVIDIA libraries; the CPU builds are on an index of
PyTorch's own. Arguments are those of `pip install`:

    python ci/install_torch.py --requirement ci/torch.txt

`TORCH_INDEX` names another index, for instance https://download.pytorch.org/whl/cu130 for a CUDA build; empty, pip
looks where it is configured to.
"""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from http.client import HTTPException

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TIMEOUT_S = 15.0


def index_options(chosen: str | None, cpu_index: str = CPU_INDEX) -> list[str]:
    """pip's options for `chosen`, the value of TORCH_INDEX: None for CPU builds where they can be had."""
    if chosen is not None:
        return ["--index-url", chosen] if chosen else []
    if can_be_reached(f"{cpu_index}/torch/"):
        return ["--index-url", cpu_index]
    print(
        f"{cpu_index} cannot be reached, so pip looks for torch where it is configured to; PyPI's torch for Linux "
        "x86-64 is a CUDA build of several gigabytes.",
        file=sys.stderr,
    )
    return []


def can_be_reached(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S):
            return True
    except (OSError, HTTPException):
        return False


if __name__ == "__main__":
    options = index_options(os.environ.get("TORCH_INDEX"))
    sys.exit(subprocess.run([sys.executable, "-m", "pip", "install", *options, *sys.argv[1:]], check=False).returncode)
