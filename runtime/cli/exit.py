"""Turns the errors of a command line into messages and exit codes."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable
from typing import Any

_SERVING = ("fastapi", "llguidance", "prometheus_client", "pydantic", "python_multipart", "starlette", "uvicorn")


def exit_with_message(command: Callable[[], Any]) -> None:
    """Runs `command`, click's `main` with standalone_mode=False, and exits.

    Exit codes: 1 for a user error, with one sentence on stderr; 2 for wrong usage; 130 for Ctrl-C.
    """
    try:
        code = _run(command)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    sys.exit(code)


def _run(command: Callable[[], Any]) -> Any:
    import click  # here, where Ctrl-C is caught

    from gemma3n_onnx.runtime.errors import Gemma3nError, as_flag

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # prints ? for a character that the terminal lacks
    try:
        return command()
    except Gemma3nError as error:
        return _complain(error.spelled(as_flag))
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort as error:
        raise KeyboardInterrupt from error
    except ModuleNotFoundError as error:
        return _complain(missing_package(error))
    except MemoryError:
        return _complain("Out of memory; use a smaller batch, prompt or model.")
    except OSError as error:
        reason = error.strerror or str(error)
        return _complain(f"{reason}{f': {error.filename}' if error.filename else ''}.")


def _complain(sentence: str) -> int:
    print(f"Error: {sentence}", file=sys.stderr)
    return 1


def missing_package(error: ImportError) -> str:
    """The message for a command whose package is not installed."""
    extra = "serve" if error.name in _SERVING else "evaluate" if error.name == "lm_eval" else "export"
    return f'This command needs {error.name or error}; install it with: pip install "gemma3n-onnx[{extra}]".'
