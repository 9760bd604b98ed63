"""Artifacts of the Hub, from a stand-in of it on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from gemma3n_onnx.runtime import ArtifactError, ArtifactNotFoundError, OnnxGemma3n, OptionError, PackageMissingError
from gemma3n_onnx.runtime.hub import download, find_artifact
from gemma3n_onnx.runtime.serve.model_pool import ModelPool, ServeOptions
from hub_server import Hub, commit_of, hub_server
from support import run_command

REPO = "maker/gemma-small"
PROMPT = ("Hello", "--max-new-tokens", "4")


@pytest.fixture
def uploaded(small_artifact: Path, tmp_path: Path) -> Path:
    """A copy of the artifact that a test may damage, with files that are none of it."""
    folder = Path(shutil.copytree(small_artifact, tmp_path / "uploaded"))
    (folder / "README.md").write_text("A model card.")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("More.")
    return folder


@pytest.fixture
def hub(uploaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """With the repository `REPO`. This process and those that it starts look there, and have empty caches and an empty
    current folder."""
    with hub_server() as running:
        running.repos[REPO] = {"main": uploaded}
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("GEMMA3N_CACHE", str(tmp_path / "cache"))
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        yield running


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def gemma3n(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which reads HF_ENDPOINT as a user's does."""
    code = "from gemma3n_onnx.runtime.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, env=os.environ
    )


def test_pull_downloads_the_files_of_the_manifest(hub: Hub, small_artifact: Path) -> None:
    done = gemma3n("pull", REPO, "--output", "models/small")
    assert (done.returncode, done.stdout) == (0, "models/small\n"), done.stderr
    assert contents(Path("models/small")) == contents(small_artifact)
    assert [path.name for path in Path("models").iterdir()] == ["small"]
    assert sorted(hub.sent) == sorted(contents(small_artifact)), "each file once, and no others"


def test_commands_take_a_hub_id(hub: Hub, small_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = (run_command(monkeypatch, ["gemma3n", "run", str(each), *PROMPT]) for each in (small_artifact, REPO))
    assert (there.code, there.out) == (0, here.out)
    shown = run_command(monkeypatch, ["gemma3n", "inspect", REPO, "--verify"])
    assert shown.code == 0 and "checksums match" in shown.out
    sizes = ("--prompt-tokens", "8", "--new-tokens", "2", "--context", "32", "--runs", "1", "--json")
    measured = run_command(monkeypatch, ["gemma3n", "bench", REPO, *sizes])
    assert measured.code == 0 and json.loads(measured.out)[0]["precision"] == "fp32"
    assert sorted(hub.sent) == sorted(contents(small_artifact)), "downloaded once for all"


def test_the_server_offers_it_by_its_id(hub: Hub) -> None:
    pool = ModelPool([Path(REPO)], ServeOptions(context=64), {"threads": 1})
    assert pool.names == [REPO, "gemma-small"]
    pool.release(pool.acquire("gemma-small"))
    pool.close()


def test_python_takes_a_hub_id_and_a_revision(hub: Hub, uploaded: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(uploaded, tmp_path / "v1"))
    hub.repos[REPO]["v1"] = other
    folders = [OnnxGemma3n.from_pretrained(REPO, revision=each).folder for each in (None, "v1", commit_of(other))]
    assert [folder.name for folder in folders] == [commit_of(uploaded), commit_of(other), commit_of(other)]


def test_a_local_folder_of_that_name_wins(hub: Hub, small_artifact: Path) -> None:
    shutil.copytree(small_artifact, REPO)
    assert OnnxGemma3n.from_pretrained(REPO).folder == Path(REPO) == find_artifact(Path(REPO))
    assert hub.sent == []
    with pytest.raises(OptionError, match="leave revision 'v1' out"):
        OnnxGemma3n.from_pretrained(REPO, revision="v1")
    with pytest.raises(OptionError, match="leave revision 'v1' out"):
        OnnxGemma3n.from_pretrained("nowhere", revision="v1")


def test_without_network_what_was_downloaded_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = download(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download(REPO) == folder
    with pytest.raises(ArtifactNotFoundError, match="the Hub cannot be reached"):
        download("maker/other")


def test_a_hub_that_does_not_answer_is_tried_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = download(REPO)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits for another try"))
    assert download(REPO) == folder
    with pytest.raises(ArtifactNotFoundError, match="the Hub cannot be reached"):
        download("maker/other")


def test_a_damaged_file_is_refused_and_downloaded_again(hub: Hub, uploaded: Path, small_artifact: Path) -> None:
    content = (small_artifact / "decoder.onnx.data").read_bytes()
    (uploaded / "decoder.onnx.data").write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(ArtifactError, match=f"decoder.onnx.data of {REPO} is damaged"):
        download(REPO)
    assert not cached_folders()
    (uploaded / "decoder.onnx.data").write_bytes(content)
    assert contents(download(REPO)) == contents(small_artifact)
    assert hub.sent.count("decoder.onnx.data") == 2
    assert hub.sent.count("decoder.onnx") == 1, "what was whole is kept"


@pytest.mark.parametrize("trouble", ["broken", "cut"])
def test_an_interrupted_download_is_resumed(
    hub: Hub, small_artifact: Path, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between the tries of huggingface_hub
    getattr(hub, trouble).add("token_embeddings.bin")
    with pytest.raises(ArtifactError, match=f"{REPO} could not be downloaded") as caught:
        download(REPO)
    assert str(caught.value).endswith("; try again.") and "\n" not in str(caught.value)
    assert not cached_folders()
    getattr(hub, trouble).clear()
    assert contents(download(REPO)) == contents(small_artifact)
    assert hub.sent.count("decoder.onnx") == 1


def cached_folders() -> list[Path]:
    """What looks like a complete download."""
    return [path for path in Path(os.environ["GEMMA3N_CACHE"]).glob("hub/*/*") if not path.name.startswith(".")]


def test_what_cannot_be_had_is_told(hub: Hub, uploaded: Path) -> None:
    for repo, revision, says in (
        ("maker/nothing", None, "neither a local folder nor a Hub repository"),
        (REPO, "v9", "has no revision 'v9'"),
    ):
        with pytest.raises(ArtifactNotFoundError, match=says):
            download(repo, revision)
    hub.gated.add(REPO)
    with pytest.raises(ArtifactNotFoundError, match="is gated; accept its licence"):
        download(REPO)
    hub.gated.clear()
    (uploaded / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"lacks the file tokenizer\.json, which its manifest lists"):
        download(REPO)
    (uploaded / "manifest.json").unlink()
    hub.repos["maker/checkpoint"] = {"main": uploaded}
    with pytest.raises(ArtifactNotFoundError, match="gemma3n-export --model maker/checkpoint"):
        download("maker/checkpoint")


def test_a_manifest_may_not_lead_out_of_the_folder(hub: Hub, uploaded: Path, tmp_path: Path) -> None:
    manifest = json.loads((uploaded / "manifest.json").read_text())
    manifest["files"]["../../../escaped"] = manifest["files"]["config.json"]
    (uploaded / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="not in its folder"):
        download(REPO)
    assert hub.sent == ["manifest.json"]
    assert not cached_folders()


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    outcome = run_command(monkeypatch, ["gemma3n", "run", REPO, "Hello"])
    assert outcome.code == 1
    assert outcome.err.startswith(f"Error: There is no folder {REPO}") and "gemma3n-onnx[hub]" in outcome.err
    with pytest.raises(PackageMissingError):
        find_artifact(REPO)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "'nowhere' is no Hub id"),
        (["a/b/c"], "'a/b/c' is no Hub id"),
        ([REPO, "--output", "."], "exists already"),
    ],
)
def test_pull_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str) -> None:
    outcome = run_command(monkeypatch, ["gemma3n", "pull", *arguments])
    assert (outcome.code, outcome.out) == (1, "")
    assert says in outcome.err and outcome.err.count("\n") == 1


def test_a_copy_that_fails_leaves_nothing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        Path(f".out.{os.getpid()}.partial").mkdir()
        raise OSError(28, "No space left on device", "out")

    download(REPO)
    monkeypatch.setattr(shutil, "copytree", fail)
    outcome = run_command(monkeypatch, ["gemma3n", "pull", REPO, "--output", "out"])
    assert outcome.code == 1 and outcome.err.splitlines()[-1] == "Error: No space left on device: out."
    assert list(Path.cwd().iterdir()) == []
