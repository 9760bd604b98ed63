"""`gemma3n version`: what a bug report should name."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of

import click

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "numpy", "tokenizers", "torch", "transformers", "onnx")


@click.command()
def version() -> None:
    """Print the versions of this package, of Python and of the packages that it uses."""
    click.echo(f"gemma3n-onnx {version_of('gemma3n-onnx')}")
    click.echo(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        try:
            click.echo(f"{package} {version_of(package)}")
        except PackageNotFoundError:
            continue
