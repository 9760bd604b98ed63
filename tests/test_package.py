"""The package as others import it: a root that imports nothing before it is used, and knows its version."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import gemma3n_onnx
from gemma3n_onnx import runtime

ROOT = Path(__file__).parents[1]
LOADED = "import sys; before = {*sys.modules}; import gemma3n_onnx; print(*sorted({*sys.modules} - before))"


def output_of(code: str, *options: str, folder: Path = ROOT, path: str = "") -> str:
    environment = {**os.environ, "PYTHONPATH": path} if path else None
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, check=True, cwd=folder, env=environment, capture_output=True, text=True).stdout


@pytest.mark.parametrize("where", ["clone", "elsewhere"])
def test_importing_the_package_imports_nothing_else(where: str, tmp_path: Path) -> None:
    assert output_of(LOADED, folder=ROOT if where == "clone" else tmp_path) == "gemma3n_onnx\n"


def test_the_root_offers_what_the_runtime_offers() -> None:
    assert {*gemma3n_onnx.__all__} == {*runtime.__all__, "__version__"}
    assert {*gemma3n_onnx.__all__} <= {*dir(gemma3n_onnx)}
    for name in runtime.__all__:
        assert getattr(gemma3n_onnx, name) is getattr(runtime, name)


def test_the_version_is_the_installed_one() -> None:
    assert gemma3n_onnx.__version__ == version("gemma3n-onnx")


def test_another_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="'gemma3n_onnx' has no attribute 'Gemma4'"):
        gemma3n_onnx.Gemma4  # type: ignore[attr-defined]  # noqa: B018


def test_a_clone_finds_its_rooms_without_an_installation(tmp_path: Path) -> None:
    """Without site-packages' finders: a folder on the path is all that there is."""
    code = "import gemma3n_onnx.graphs, gemma3n_onnx.matformer_configs as c; print(c.__file__)"
    found = Path(output_of(code, "-S", folder=tmp_path, path=str(ROOT)).strip())
    assert found == ROOT / "matformer_configs" / "__init__.py"
