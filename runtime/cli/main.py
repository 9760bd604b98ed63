"""The entry point of `gemma3n`: imports everything under `exit_with_message`, so that Ctrl-C prints no traceback."""

from __future__ import annotations

from .exit import exit_with_message


def main() -> None:
    exit_with_message(_run)


def _run() -> object:
    from .commands import cli

    return cli.main(prog_name="gemma3n", standalone_mode=False)
