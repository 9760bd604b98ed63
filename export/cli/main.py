"""The entry point of `gemma3n-export`: imports nothing that the `export` extra installs before errors are caught."""

from __future__ import annotations

from gemma3n_onnx.runtime.cli.exit import exit_with_message


def main() -> None:
    exit_with_message(_run)


def _run() -> object:
    from .export import export_command

    return export_command.main(prog_name="gemma3n-export", standalone_mode=False)


if __name__ == "__main__":
    main()
