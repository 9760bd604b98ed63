"""The output folder: replaced as a whole or not at all, whatever the file system and whoever died before."""

import os
import signal
from pathlib import Path

import pytest

from gemma3n_onnx.export import writer
from gemma3n_onnx.export.errors import ExportError
from gemma3n_onnx.export.layouts.select import artifact_kind
from gemma3n_onnx.export.writer import HashedFile, file_info, staged

ARTIFACT = artifact_kind()
NO_PROCESS = 2**22 + 1  # above the largest process id that Linux gives


def artifact(folder: Path, content: str = "old") -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text(content)
    return folder


def write_new(output: Path, *, force: bool = True) -> None:
    with staged(output, force=force, needed_bytes=0, kind=ARTIFACT) as folder:
        (folder / "manifest.json").write_text("new")


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two_renames"])
def test_an_artifact_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(writer, "_exchange", lambda _a, _b: False)
    output = artifact(tmp_path / "out")
    write_new(output)
    assert (output / "manifest.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_a_failing_rename_gives_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = artifact(tmp_path / "out")
    real = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise PermissionError(13, "Permission denied")
        return real(self, target)

    monkeypatch.setattr(writer, "_exchange", lambda _a, _b: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ExportError, match="Permission denied"):
        write_new(output)
    assert (output / "manifest.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_what_a_kill_between_two_renames_moved_away_comes_back(tmp_path: Path) -> None:
    artifact(tmp_path / f".out.{NO_PROCESS}.old")
    artifact(tmp_path / f".out.{NO_PROCESS}.partial", "half")
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out", force=True, needed_bytes=0, kind=ARTIFACT):
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "manifest.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_leftovers_of_the_living_and_of_other_names_stay(tmp_path: Path) -> None:
    others = [f".out.{os.getppid()}.partial", f".out2.{NO_PROCESS}.partial", ".out.notes.partial", ".out.1.txt"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / f".out.{NO_PROCESS}.partial").mkdir()
    write_new(tmp_path / "out")
    assert names(tmp_path) == sorted([*others, "out"])


def test_a_name_may_have_wildcards(tmp_path: Path) -> None:
    (tmp_path / f".a[b]*.{NO_PROCESS}.partial").mkdir()
    (tmp_path / f".ab.{NO_PROCESS}.partial").mkdir()
    write_new(tmp_path / "a[b]*")
    assert names(tmp_path) == [f".ab.{NO_PROCESS}.partial", "a[b]*"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    artifact(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    write_new(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "manifest.json").read_text() == "new"
    assert names(tmp_path) == ["link", "real"]


def test_parents_made_for_a_failure_go_with_it(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    output = tmp_path / "kept" / "a" / "b" / "out"
    with pytest.raises(KeyboardInterrupt), staged(output, force=False, needed_bytes=0, kind=ARTIFACT):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["kept"] and not names(tmp_path / "kept")


def test_signals_are_handled_as_before_afterwards(tmp_path: Path) -> None:
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    write_new(tmp_path / "out")
    assert [signal.getsignal(number) for number in numbers] == before


def test_an_ignored_hangup_stays_ignored(tmp_path: Path) -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    try:
        with staged(tmp_path / "out", force=False, needed_bytes=0, kind=ARTIFACT):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert names(tmp_path) == ["out"]


def test_a_hashed_file_knows_what_is_on_the_disk(tmp_path: Path) -> None:
    with HashedFile(tmp_path / "x") as file:
        file.write(b"abc")
        file.pad_to(8)
        file.write(b"d")
    assert (tmp_path / "x").read_bytes() == b"abc\0\0\0\0\0d"
    assert file.info() == file_info(tmp_path / "x")
