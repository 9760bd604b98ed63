"""`gemma3n pull`: an artifact of the Hub to this machine."""

from __future__ import annotations

from pathlib import Path

import click

from gemma3n_onnx.runtime.errors import OptionError
from gemma3n_onnx.runtime.hub import HUB_ID, check_new, copy_artifact, download


@click.command()
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--revision", help="Branch, tag or commit. [default: main]")
@click.option("--output", type=click.Path(path_type=Path), help="Copy the artifact to this folder.")
def pull(repo: str, revision: str | None, output: Path | None) -> None:
    """Download the artifact OWNER/NAME from the Hugging Face Hub, verify its files, and print its folder."""
    if not HUB_ID.fullmatch(repo):
        raise OptionError(f"{repo!r} is no Hub id; give an artifact's owner and name as owner/name.")
    if output is not None:
        check_new(output)  # before a download
    folder = download(repo, revision)
    if output is not None:
        copy_artifact(folder, output)
    click.echo(output or folder)
