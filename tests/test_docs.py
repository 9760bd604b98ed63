"""README and docs as a reader would follow them: every command and every Python example of a page, in order.

Left out is what sets up the very environment that the tests run in. A block whose fence names a file of this repository
is not run; it must be what that file says.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
)
EXPORTING = ("README.md", "docs/evaluation.md", "docs/quick-start.md")
NOT_HERE = {
    "bash ci/quickstart.sh",
    "bash ci/test.sh",
    "bash ci/install.sh",
    "TORCH_INDEX=https://download.pytorch.org/whl/cu130 bash ci/install.sh",
    "bash ci/lock.sh",
    "bash ci/newest.sh",
    "bash ci/release.sh",
    "python3 -m venv .venv",
    ". .venv/bin/activate",
}
BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]*)(#[^)]+)?\)|<img src=\"([^\"]+)\"")
PORT = 8000
BEGIN = """\
set -euo pipefail
server=
stop() {
  [ -z "$server" ] || { kill $server; wait $server || true; }
}
trap stop EXIT
serve() {
  stop
  "$@" &
  server=$!
  for _ in $(seq 600); do
    python -c "import socket; socket.create_connection(('127.0.0.1', PORT)).close()" 2>/dev/null && return
    sleep 0.1
  done
  return 1
}
"""


def script_of(page: str, port: int) -> str:
    """A shell script. Python blocks between two starts of a server are one program, which runs where the last is."""
    parts: list[str] = []
    program: list[str] = []
    place = 0
    for language, file, text in BLOCK.findall(page):
        if file:
            continue
        if language == "python":
            if program:
                del parts[place]
            program.append(text)
            place = len(parts)
            parts.append("python - <<'END_OF_PROGRAM'\n" + "".join(program) + "END_OF_PROGRAM\n")
        elif language == "bash":
            for line in text.splitlines(keepends=True):
                if line.startswith("gemma3n serve"):
                    program = []
                    parts.append(f"serve {line.rstrip()} --port {port}\n")
                elif line.strip() not in NOT_HERE:
                    parts.append(line)
    return BEGIN.replace("PORT", str(port)) + "".join(parts).replace(f":{PORT}/", f":{port}/")


def tracked_files() -> list[str]:
    """What git tracks and the working tree has: whoever ran a page's commands here has files of the same names."""
    listed = subprocess.run(["git", "ls-files", "-z"], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """pip's settings with which the environments that pages make get the versions of this one."""
    file = tmp_path_factory.mktemp("constraints") / "versions.txt"
    installed = {each.name: each.version for each in distributions() if "+" not in each.version}
    file.write_text("".join(f"{name}=={number}\n" for name, number in installed.items() if name != "gemma3n-onnx"))
    return {"PIP_CONSTRAINT": str(file), "PIP_BUILD_CONSTRAINT": str(file)}


@pytest.fixture
def port() -> Iterator[int]:
    """Nobody else is given it meanwhile: it is bound, and not listened at, which lets a server do so."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def workspace(request: pytest.FixtureRequest, tmp_path: Path, demo_artifact: Callable[[str], Path]) -> Path:
    """A copy of the repository, Google's checkpoint played by the demo, and what the quick start has made."""
    folder = tmp_path / "repository"
    for name in tracked_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "google").mkdir()
    (folder / "google" / "gemma-3n-E4B-it").symlink_to(folder / "demo")
    Image.open(folder / "demo" / "picture.png").convert("RGB").save(folder / "photo.jpg")
    if request.node.callspec.params["page"] not in EXPORTING:
        (folder / "demo-E2B").symlink_to(demo_artifact("E2B"))
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, workspace: Path, port: int, locked: dict[str, str]) -> None:
    text = (ROOT / page).read_text()
    script = script_of(text, port)
    before = {*workspace.iterdir()}
    commands = Path(sys.executable).parent
    path = f"{commands}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        check=False,
        cwd=workspace,
        env={**os.environ, **locked, "PATH": path, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert not not_ignored({*workspace.iterdir()} - before), "a reader's clone would no longer be clean"
    for language, _, shown in BLOCK.findall(text):
        if language == "text":
            assert {*shown.splitlines()} <= {*done.stdout.splitlines()}


def not_ignored(paths: set[Path]) -> set[str]:
    """The names that git does not ignore at the top of the repository."""
    names = {f"{path.name}/" if path.is_dir() else path.name for path in paths}
    asked = subprocess.run(
        ["git", "check-ignore", "--stdin"],
        check=False,
        cwd=ROOT,
        input="\n".join(names),
        capture_output=True,
        text=True,
    )
    return names - {*asked.stdout.splitlines()}


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_of_a_file_is_there(page: str) -> None:
    for _, file, text in BLOCK.findall((ROOT / page).read_text()):
        if file:
            lines = iter((ROOT / file).read_text().splitlines())
            assert all(line in lines for line in text.splitlines()), file


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for path, anchor, image in LINK.findall((ROOT / page).read_text()):
        target = (ROOT / page).parent / (path or image) if path or image else ROOT / page
        assert target.exists(), path or image
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor[1:] in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, anchor


@pytest.mark.parametrize("page", PAGES)
def test_scripts_and_options_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for path in re.findall(r"\b(?:benchmarks|ci|tests|export|runtime|training|graphs)/[\w/]+\.(?:py|sh|mjs)", text):
        assert (ROOT / path).exists(), path
    folders = ("runtime", "export", "benchmarks", "ci")
    commands = "".join(path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py"))
    for option in re.findall(r"`(--[a-z][a-z-]+)", text):
        assert f'"{option}"' in commands or f"{option}/" in commands or f"/{option}" in commands, option
