"""What the project's scripts install: the locked versions, and torch for the CPU wherever it can be had."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import install_torch

ROOT = Path(__file__).parents[1]
PINNED = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "ci" / "torch.txt").read_text(), re.MULTILINE))
LOCKED = dict(re.findall(r"^(\S+)==(\S+)", (ROOT / "ci" / "lock.txt").read_text(), re.MULTILINE))
ACCELERATORS = ("cuda", "nvidia", "triton")


def wheel(folder: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file_name = name.replace("-", "_")
    info = f"{file_name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {each}\n" for each in requires)
    with zipfile.ZipFile(folder / f"{file_name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{info}/METADATA", metadata)
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of two package indexes: `cpu` as PyTorch's own, and `pypi`, whose torch wants NVIDIA's libraries."""
    folder = tmp_path_factory.mktemp("indexes")
    for name, version in PINNED.items():
        wheel(folder / "cpu" / name, name, f"{version}+cpu")
        wheel(folder / "pypi" / name, name, version, ("nvidia-cublas",) if name == "torch" else ())
    wheel(folder / "pypi" / "nvidia-cublas", "nvidia-cublas", "13.1.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address at which nothing listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}/whl/cpu"


def resolved(indexes: str, options: list[str]) -> set[str]:
    """What pip would install with `options`, where it is configured to look at `pypi`."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": f"{indexes}/pypi", "PIP_NO_CACHE_DIR": "1"}
    command += [*options, "--requirement", str(ROOT / "ci" / "torch.txt")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=clean | settings)
    return {f"{each['metadata']['name']} {each['metadata']['version']}" for each in json.loads(done.stdout)["install"]}


def test_cpu_builds_are_taken_where_their_index_is_reached(indexes: str, capfd: pytest.CaptureFixture[str]) -> None:
    found = resolved(indexes, install_torch.index_options(None, cpu_index=f"{indexes}/cpu"))
    assert found == {f"{name} {version}+cpu" for name, version in PINNED.items()}
    assert capfd.readouterr().err == ""


def test_elsewhere_pip_looks_where_it_is_configured_to(
    indexes: str, nobody: str, capfd: pytest.CaptureFixture[str]
) -> None:
    found = resolved(indexes, install_torch.index_options(None, cpu_index=nobody))
    assert found == {f"{name} {version}" for name, version in PINNED.items()} | {"nvidia-cublas 13.1.1"}
    assert f"{nobody} cannot be reached" in capfd.readouterr().err


def test_an_index_that_answers_with_an_error_is_not_reached(indexes: str) -> None:
    assert install_torch.index_options(None, cpu_index=f"{indexes}/no-such-index") == []


def test_a_chosen_index_is_taken_unasked(indexes: str, nobody: str) -> None:
    assert install_torch.index_options(nobody) == ["--index-url", nobody]
    assert install_torch.index_options("", cpu_index=f"{indexes}/cpu") == []


def test_every_requirement_is_locked_with_hashes() -> None:
    """But for torch and torchvision, whose builds differ from index to index."""
    text = (ROOT / "ci" / "lock.txt").read_text()
    entries = re.split(r"^(?=\S)", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE), flags=re.MULTILINE)
    assert all("--hash=sha256:" in entry for entry in entries if entry)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*extras["dependencies"], *(each for extra in extras["optional-dependencies"].values() for each in extra)]
    names = {re.split(r"[\[<>=,]", each)[0].replace("_", "-").lower() for each in wanted}
    assert names - {"gemma3n-onnx", "onnxruntime-gpu"} - PINNED.keys() <= LOCKED.keys()
    assert "setuptools" in LOCKED, "the project itself is built without an environment of its own"


def test_no_accelerator_is_locked() -> None:
    assert not [name for name in LOCKED if name.startswith(ACCELERATORS) or name in PINNED]
