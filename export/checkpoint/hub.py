"""Locates a checkpoint: a local folder, the packaged demo, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from gemma3n_onnx.export.errors import CheckpointError, CheckpointNotFoundError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
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
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"{path} is a local folder; leave revision {revision!r} out.")
        return path
    if model == DEMO:
        if revision is not None:
            raise CheckpointError(f"The checkpoint {DEMO} has no revisions; leave revision {revision!r} out.")
        return _find_demo()
    if path.exists():
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
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(repo, revision=revision, token=token, allow_patterns=FILE_PATTERNS)
        )
    except errors.GatedRepoError as error:
        raise CheckpointNotFoundError(
            f"{repo} is gated; accept its licence at https://huggingface.co/{repo} "
            "and set HF_TOKEN to a token of that account."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{repo} has no revision {revision!r}; give a branch, tag or commit listed at "
            f"https://huggingface.co/{repo}/commits."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise CheckpointNotFoundError(
            f"{repo!r} is neither a local folder nor a Hub repository that this token can access; "
            "check the spelling, or set HF_TOKEN if it is private."
        ) from error
    except (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        raise CheckpointNotFoundError(
            f"{repo} is not in the local cache and the Hub cannot be reached; "
            "check the network and HF_HUB_OFFLINE, or give a local folder."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{repo} could not be downloaded: {error}") from error
