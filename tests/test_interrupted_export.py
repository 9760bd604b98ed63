"""An export that is killed at any moment leaves the old artifact or the whole new one, and nothing beside it."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma3n_onnx.runtime import OnnxGemma3n
from gemma3n_onnx.runtime.artifact import load_manifest, verify_checksums
from support import DEFAULT_SIGNALS

# The export command over traced graphs, so that what is left to interrupt is the writing. Each line of stdin forks one,
# which tells the parent at the moment that the line names, and waits to be killed; "" never waits. Forking a process
# that has imported torch saves two seconds of each.
DRIVER = """
import json, os, shutil, sys, time
from pathlib import Path
import onnx_ir as ir
from gemma3n_onnx.export import pipeline, trace, writer
from gemma3n_onnx.export.cli import main as cli
from gemma3n_onnx.runtime import artifact

decoder, embedding, *arguments = sys.argv[1:]
for line in sys.stdin:
    moment, stderr = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        break
    _, status = os.waitpid(child, 0)
    print("ended", os.waitstatus_to_exitcode(status), flush=True)
else:
    sys.exit()

def traced(path):
    model = ir.load(path)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return model

trace.trace_decoder = lambda *_: traced(decoder)
trace.trace_embedding = lambda *_: traced(embedding)

def tell(name):
    if name == moment:
        print("at", name, flush=True)
        for _ in range(600):  # a signal just before a system call does not cut that call short
            time.sleep(0.1)

def around(owner, name, counted=False):
    real, calls = getattr(owner, name), 0
    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        label = f"{name} {calls}" if counted else name
        tell("before " + label)
        result = real(*args, **kwargs)
        tell("after " + label)
        return result
    setattr(owner, name, wrapped)

around(trace, "trace_decoder")
around(writer.HashedFile, "write", counted=True)
around(pipeline, "_copy_companions")
around(artifact, "save_manifest")
around(writer, "_put_in_place")
around(shutil, "rmtree")
print("started", os.getpid(), flush=True)
sys.argv[1:] = arguments
cli.main()
"""

MOMENTS = (
    "before trace_decoder",
    "before write 1",
    "after write 40",
    "before _copy_companions",
    "before save_manifest",
    "before _put_in_place",
    "before rmtree",
)


class Scene:
    """An artifact, and exports over it."""

    def __init__(self, folder: Path, checkpoint: Path, artifact: Path) -> None:
        self.folder, self.artifact = folder, folder / "artifact"
        self.stderr = folder.parent / "stderr"
        shutil.copytree(artifact, self.artifact)
        self.old = self.tokens()
        command = [sys.executable, "-c", DEFAULT_SIGNALS + DRIVER]
        command += [str(artifact / "decoder.onnx"), str(artifact / "embedding.onnx")]
        command += ["--model", str(checkpoint), "--output", str(self.artifact), "--force", "--quiet"]
        self.driver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, moment: str = "") -> int:
        """Process id of an export that has started, and stands at `moment` if one is given."""
        assert self.driver.stdin is not None
        print(json.dumps([moment, str(self.stderr)]), file=self.driver.stdin, flush=True)
        word, pid = self._read().split()
        assert word == "started"
        if moment:
            assert self._read() == f"at {moment}", self.stderr.read_text()
        return int(pid)

    def end(self) -> tuple[int, str]:
        """Exit code and stderr of the export."""
        word, code = self._read().split()
        assert word == "ended"
        return int(code), self.stderr.read_text()

    def interrupt(self, moment: str, number: signal.Signals, delay: float = 0.0) -> tuple[int, str]:
        """Exit code and stderr of an export that gets the signal at `moment`, or after a delay in seconds."""
        process = self.start(moment)
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
        return self.end()

    def _read(self) -> str:
        assert self.driver.stdout is not None
        return self.driver.stdout.readline().strip()

    def tokens(self) -> tuple[int, ...]:
        """What the artifact, complete and undamaged, answers."""
        verify_checksums(self.artifact, load_manifest(self.artifact))
        return OnnxGemma3n.from_pretrained(self.artifact).generate("Hello", max_new_tokens=6).token_ids

    @property
    def beside(self) -> list[str]:
        return sorted(name for name in os.listdir(self.folder) if name != "artifact")


@pytest.fixture(scope="module")
def scene(small_checkpoint: Path, small_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("interrupted") / "place"
    folder.mkdir()
    scene = Scene(folder, small_checkpoint, small_artifact)
    yield scene
    scene.driver.communicate(timeout=60)


@pytest.fixture(scope="module")
def seconds(scene: Scene) -> float:
    """How long an undisturbed export takes after its imports."""
    started = time.monotonic()
    scene.start()
    assert scene.end() == (0, "")
    assert scene.beside == []
    return time.monotonic() - started


def test_a_kill_leaves_a_whole_artifact(scene: Scene, seconds: float) -> None:
    rng = random.Random(3)
    times = [("", rng.uniform(0, seconds)) for _ in range(3)]
    for moment, delay in [*((moment, 0.0) for moment in MOMENTS), *times]:
        code, err = scene.interrupt(moment, signal.SIGKILL, delay)
        assert code in (-signal.SIGKILL, 0), err
        assert scene.tokens() == scene.old, (moment, delay)
        assert all(name.startswith(".artifact.") for name in scene.beside)  # at most the last one's: it clears
        assert len(scene.beside) <= 1, scene.beside
    scene.start()
    assert scene.end() == (0, "")
    assert scene.beside == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_request_to_stop_leaves_nothing_beside_the_artifact(
    scene: Scene, seconds: float, number: signal.Signals
) -> None:
    moment = {signal.SIGTERM: "before write 63", signal.SIGINT: "before _copy_companions"}.get(number, "after write 9")
    delay = random.Random(number).uniform(0, seconds)
    for where, after in ((moment, 0.0), ("", delay)):
        code, err = scene.interrupt(where, number, after)
        # At a random time the command may be done, or not yet at the point where it has something to remove.
        assert code in ((128 + number,) if where else (128 + number, -number, 0)), err
        assert "Traceback" not in err
        assert scene.beside == []
        assert scene.tokens() == scene.old


def test_signals_do_not_cut_the_exchange_in_two(scene: Scene) -> None:
    process = scene.start("before _put_in_place")
    os.kill(process, signal.SIGTERM)
    os.kill(process, signal.SIGINT)
    time.sleep(0.2)
    os.kill(process, signal.SIGKILL)  # the driver's child cannot be gone: only the driver removes it
    code, err = scene.end()
    assert code == -signal.SIGKILL, f"the last step was interrupted: {err}"
    assert scene.tokens() == scene.old
