"""What the system tells of memory is there, of the right size, and nothing where there is no /proc."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gemma3n_onnx.runtime import system

MIB = 2**20
HELD = """
import json, mmap, sys
import numpy as np
from gemma3n_onnx.runtime import system

def sizes():
    return [system.private_memory_bytes(), system.mapped_memory_bytes(), system.resident_memory_bytes()]

before = sizes()
held = np.ones(64 << 20, np.uint8)
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
mapped.read()
after = sizes()
del held
print(json.dumps([before, after, sizes(), system.peak_memory_bytes(), system.mapped_files()]), flush=True)
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells this in /proc")


def test_private_and_mapped_memory_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.write_bytes(bytes(32 * MIB))
    done = subprocess.run([sys.executable, "-c", HELD, str(file)], check=True, capture_output=True, text=True)
    before, after, end, peak, files = json.loads(done.stdout)
    private, mapped, resident = (after[i] - before[i] for i in range(3))
    assert private == pytest.approx(64 * MIB, abs=4 * MIB)
    assert mapped == pytest.approx(32 * MIB, abs=4 * MIB)
    assert resident == pytest.approx(96 * MIB, abs=8 * MIB)
    assert end[2] < after[2] - 60 * MIB, "it was freed again"
    assert peak >= after[2] - MIB
    assert str(file) in files


def test_a_process_is_not_charged_for_its_parent() -> None:
    held = np.ones(256 * MIB, np.uint8)
    code = "from gemma3n_onnx.runtime import system; print(system.peak_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) < held.nbytes


def test_another_process_is_asked_by_its_id() -> None:
    assert system.resident_memory_bytes(os.getpid()) == pytest.approx(system.resident_memory_bytes(), rel=0.1)
    assert system.private_memory_bytes(2**30) is None


def test_the_free_memory_is_the_machines() -> None:
    assert 1 << 26 < (system.available_memory_bytes() or 0) < 1 << 50


def test_elsewhere_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_lines", lambda file: [])
    assert system.available_memory_bytes() is system.private_memory_bytes() is None
    assert system.mapped_files() == []
    assert (system.peak_memory_bytes() or 0) > MIB, "which is told everywhere but under Windows"
