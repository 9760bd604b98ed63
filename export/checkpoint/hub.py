"""Locates a checkpoint: a local folder, the packaged demo, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from gemma3n_onnx.export.errors import CheckpointError, CheckpointNotFoundError
from gemma3n_onnx.runtime.hub import HUB_ID, using_hub

SLICE_TABLE = "slices.csv"
FILE_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", SLICE_TABLE]
DEMO = "demo"
"""The name of the checkpoint in a clone's folder `demo`, which is a separate distribution."""
DEMO_PACKAGES = ("gemma3n_onnx.demo", "gemma3n_onnx_demo")
"""The import name of that folder in a clone, and of the installed distribution."""


def find_folder(model: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The local folder `model`, else the demo if it is "demo", else the downloaded snapshot of a Hub id.

    Raises:
        CheckpointNotFoundError: no such folder or Hub repository, or no access to it.
        CheckpointError: the download failed, or `revision` is given without a Hub id.
    """
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):  # unlike `Path.is_dir`, False for a name that is too long
        if revision is not None:
            raise CheckpointError(f"{path} is a local folder; leave revision {revision!r} out.")
        return path
    if model == DEMO:
        if revision is not None:
            raise CheckpointError(f"The checkpoint {DEMO} has no revisions; leave revision {revision!r} out.")
        return _find_demo()
    if os.path.exists(path):
        raise CheckpointNotFoundError(f"{path} is a file; give the checkpoint's folder.")
    if isinstance(model, Path) or not HUB_ID.fullmatch(model):
        raise CheckpointNotFoundError(
            f"{str(model)!r} does not exist; give a checkpoint's folder, or a Hub id such as google/gemma-3n-E2B-it."
        )
    return _download(model, revision, token)


def _find_demo() -> Path:
    for package in DEMO_PACKAGES:
        try:
            config = resources.files(package) / "config.json"
        except ModuleNotFoundError:
            continue
        if config.is_file():
            return Path(str(config)).parent
    raise CheckpointNotFoundError(
        f"The {DEMO} checkpoint is not installed; install gemma3n-onnx-demo (pip install ./demo in a clone of "
        "gemma3n-onnx), or give a checkpoint's folder or a Hub id."
    )


def _download(repo: str, revision: str | None, token: str | None) -> Path:
    import huggingface_hub

    with using_hub(repo, revision, CheckpointNotFoundError, CheckpointError) as only_local:
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                token=token,
                allow_patterns=FILE_PATTERNS,
                local_files_only=only_local,
            )
        )
