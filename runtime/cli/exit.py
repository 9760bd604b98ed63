"""How a command line ends: an error becomes one sentence and an exit code."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable
from typing import Any

import click

from gemma3n_onnx.runtime.errors import Gemma3nError

_SERVING = ("fastapi", "llguidance", "prometheus_client", "pydantic", "python_multipart", "starlette", "uvicorn")


def exit_with_message(command: Callable[[], Any]) -> None:
    """Runs a command line, given as click's `main` with standalone_mode=False, and exits.

    A user's error becomes one sentence on stderr and exit code 1, a wrong usage 2, Ctrl-C 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character ends no answer
    try:
        code = command()
    except Gemma3nError as error:
        code = _complain(str(error))
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = 128 + signal.SIGINT
    except ModuleNotFoundError as error:
        code = _complain(missing_package(error))
    except MemoryError:
        code = _complain("The memory of this machine is used up; use a smaller batch, prompt or model.")
    except OSError as error:
        reason = error.strerror or str(error)
        code = _complain(f"{reason}{f': {error.filename}' if error.filename else ''}.")
    sys.exit(code)


def _complain(sentence: str) -> int:
    click.echo(f"Error: {sentence}", err=True)
    return 1


def missing_package(error: ImportError) -> str:
    """The sentence about a command whose package is not installed."""
    extra = "serve" if error.name in _SERVING else "export"
    return f'This command needs {error.name or error}; install it with: pip install "gemma3n-onnx[{extra}]".'
