"""The package as others get it: what its root offers, and what is in its wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from importlib.metadata import version
from pathlib import Path

import pytest

import gemma3n_onnx
from gemma3n_onnx import runtime

ROOT = Path(__file__).parents[1]
ROOMS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
PYTHON = "Programming Language :: Python :: "
FIND_DEMO = """
import sys
sys.meta_path = [each for each in sys.meta_path if "Editable" not in getattr(each, "__name__", "")]
from gemma3n_onnx.export.checkpoint.hub import find_folder
print(find_folder("demo"))
"""
LOADED = "import sys; before = {*sys.modules}; import gemma3n_onnx; print(*sorted({*sys.modules} - before))"


def run(code: str, *options: str, folder: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs `code` in `folder`, with `path` before everything that is installed."""
    environment = {**os.environ, **({} if path is None else {"PYTHONPATH": str(path)})}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, check=False, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("where", ["clone", "elsewhere"])
def test_importing_the_package_imports_nothing_else(where: str, tmp_path: Path) -> None:
    assert run(LOADED, folder=ROOT if where == "clone" else tmp_path).stdout == "gemma3n_onnx\n"


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


def test_a_clone_finds_its_rooms_and_the_demo_without_an_installation(tmp_path: Path) -> None:
    """Without site-packages: the clone on the path is all that there is."""
    code = "import gemma3n_onnx.matformer_configs as a, gemma3n_onnx.demo as b; print(a.__file__, b.__file__)"
    done = run(code, "-S", folder=tmp_path, path=ROOT)
    expected = [str(ROOT / name / "__init__.py") for name in ("matformer_configs", "demo")]
    assert done.stdout.split() == expected, done.stderr


def build(source: Path, folder: Path) -> Path:
    """The wheel of the sdist of the project in `source`, where the build leaves files too."""
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=source, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(sdist)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By distribution, built from a copy of all that a clone has for them."""
    folder = tmp_path_factory.mktemp("wheels")
    clone = folder / "clone"
    for name in (*ROOMS.values(), "demo", "training"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, clone / name)
    return {
        "gemma3n-onnx": build(clone, folder / "gemma3n-onnx"),
        "gemma3n-onnx-demo": build(clone / "demo", folder / "gemma3n-onnx-demo"),
    }


def test_the_wheel_holds_the_rooms_and_nothing_else(wheels: dict[str, Path]) -> None:
    wheel = wheels["gemma3n-onnx"]
    with zipfile.ZipFile(wheel) as file:
        found = {name.removeprefix("gemma3n_onnx/") for name in file.namelist() if ".dist-info/" not in name}
    expected = {
        f"{'' if folder == 'gemma3n_onnx' else f'{folder}/'}{path.relative_to(ROOT / folder)}"
        for folder in ROOMS.values()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert found == expected
    assert wheel.stat().st_size < 10**6


def test_the_metadata_is_fit_for_an_index(wheels: dict[str, Path]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(wheels["gemma3n-onnx"]) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        found = message_from_string(file.read(name).decode())
    assert found["Description-Content-Type"] == "text/markdown"
    assert found.get_payload() == (ROOT / "README.md").read_text()
    assert {*found.get_all("Classifier", [])} == {*project["classifiers"]}
    assert {*found.get_all("Provides-Extra", [])} == {*project["optional-dependencies"]}
    known = {version.removeprefix(PYTHON) for version in project["classifiers"] if version.startswith(PYTHON + "3.")}
    assert f">={min(known, key=lambda v: int(v[2:]))}" == project["requires-python"] == found["Requires-Python"]


def test_away_from_a_clone_the_demo_is_a_distribution_of_its_own(wheels: dict[str, Path], tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheels["gemma3n-onnx"]).extractall(site)
    done = run(FIND_DEMO, folder=tmp_path, path=site)
    assert "CheckpointNotFoundError: The demo checkpoint is not installed; install gemma3n-onnx-demo" in done.stderr
    zipfile.ZipFile(wheels["gemma3n-onnx-demo"]).extractall(site)
    done = run(FIND_DEMO, folder=tmp_path, path=site)
    assert Path(done.stdout.strip()) == site / "gemma3n_onnx_demo", done.stderr
    weights = "model.safetensors"
    assert (site / "gemma3n_onnx_demo" / weights).read_bytes() == (ROOT / "demo" / weights).read_bytes()
