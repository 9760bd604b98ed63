"""`gemma3n serve` in a process of its own."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from support import DEFAULT_SIGNALS

CODE = f"{DEFAULT_SIGNALS}\nfrom gemma3n_onnx.runtime.cli.main import main; main()"


@dataclass
class ServerProcess:
    process: subprocess.Popen[bytes]
    log: Path

    def read_log(self) -> str:
        return self.log.read_text()

    @property
    def url(self) -> str:
        """Waits until the server accepts connections."""
        for _ in range(600):
            if "startup complete" in self.read_log():
                found = re.search(r"^Page: (\S+)$", self.read_log(), re.MULTILINE)
                assert found
                return found[1]
            assert self.process.poll() is None, self.read_log()
            time.sleep(0.05)
        raise TimeoutError(self.read_log())

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return str(parts.hostname), int(parts.port or 0)


@contextmanager
def server_process(
    artifact: Path, log: Path, *options: object, open_files: int | None = None
) -> Iterator[ServerProcess]:
    """Serves on a free port; `open_files`: that it may have."""

    def limit() -> None:
        if open_files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))

    command = [sys.executable, "-c", CODE, "serve", artifact, "--port", 0, "--context", 4096, *options]
    with log.open("wb") as out:
        process = subprocess.Popen([*map(str, command)], stdout=out, stderr=out, preexec_fn=limit)  # noqa: PLW1509
    try:
        yield ServerProcess(process, log)
    finally:
        process.kill()
        process.wait()
