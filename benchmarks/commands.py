"""The commands of this package, run as the scripts of this folder need them: in a process of their own."""

from __future__ import annotations

import subprocess
import sys


def run(module: str, *arguments: object, check: bool = True) -> int:
    """`main` of a module of the package; its exit code."""
    code = f"from gemma3n_onnx.{module} import main; main()"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=check).returncode


def gemma3n(*arguments: object, check: bool = True) -> int:
    return run("runtime.cli.main", *arguments, check=check)
