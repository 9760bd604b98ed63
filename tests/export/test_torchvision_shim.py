"""transformers' Gemma 3n can be imported beside any torchvision that may be installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPLETE = """
from gemma3n_onnx.export.verify.torchvision_shim import complete_torchvision
complete_torchvision()
complete_torchvision()
"""
# As torchvision's own modules do: what is compiled, or nothing where that does not load, and then what leans on it.
COMPILED = """
import torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
LEANING = """
import torch
for name in ("nms", "qnms"):
    torch.library.register_fake(f"torchvision::{name}")(lambda *_: None)
"""
BUILDS = {
    "that fits": COMPILED + LEANING,
    "of another torch": LEANING,
    "that fails otherwise": "raise RuntimeError('no driver')",
    "that is broken": "import no_such_module",
}


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})


@pytest.mark.parametrize("build", BUILDS)
def test_a_torchvision(build: str, tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(BUILDS[build])
    done = run(f"{COMPLETE}import torchvision", tmp_path)
    expected = {"that fails otherwise": "no driver", "that is broken": "no_such_module"}.get(build, "")
    assert (done.returncode == 0) == (not expected), done.stderr
    assert expected in done.stderr


def test_the_one_that_is_installed_here(tmp_path: Path) -> None:
    code = f"{COMPLETE}import timm, torchvision.transforms, transformers.models.gemma3n.modeling_gemma3n as found"
    done = run(f"{code}; print(found.Gemma3nModel.__name__)", tmp_path)
    assert done.stdout.strip() == "Gemma3nModel", done.stderr
