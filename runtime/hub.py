"""Artifacts on the Hugging Face Hub.

They are kept in `hub/` of the cache folder (`GEMMA3N_CACHE`, by default `~/.cache/gemma3n-onnx`), one folder for each
commit, which appears once every file has the SHA-256 of the manifest. The Hub's own cache has links in place of files,
which ONNX Runtime refuses for graphs that it loads from memory.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from .artifact import MANIFEST, Manifest, read_manifest, sha256_of
from .errors import ArtifactError, ArtifactNotFoundError, Gemma3nError, OptionError, PackageMissingError
from .system import cache_folder

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ANSWER_SECONDS = 5.0


def find_artifact(artifact: str | Path, revision: str | None = None) -> Path:
    """A local folder as given, else the folder of the Hub id `artifact` ("owner/name"), see `download`.

    Whether a local folder exists and what it holds is left to `load_manifest`.

    Raises:
        OptionError: there is a `revision`, but `artifact` is not a Hub id. The errors of `download`.
    """
    name = artifact if isinstance(artifact, str) else artifact.as_posix()
    if HUB_ID.fullmatch(name) and not os.path.exists(artifact):
        return download(name, revision)
    if revision is not None:
        raise OptionError(f"{artifact} is a local folder, or no Hub id; leave revision {revision!r} out.")
    return Path(artifact)


def download(repo: str, revision: str | None = None) -> Path:
    """The folder of the artifact `repo`, downloaded unless that commit is in the cache.

    Only the files of the manifest are downloaded. The next call resumes an interrupted download.

    Raises:
        PackageMissingError: huggingface_hub is not installed.
        ArtifactNotFoundError: no such repository or revision, no access to it, no artifact in it, or no network.
        ArtifactError: the download failed, a file is damaged, or the manifest cannot be used.
    """
    try:
        import huggingface_hub
        from filelock import FileLock
        from huggingface_hub.errors import RemoteEntryNotFoundError
    except ImportError as error:
        raise PackageMissingError(
            f"There is no folder {repo}, and loading it from the Hub needs huggingface_hub; check the path, or "
            'install it with: pip install "gemma3n-onnx[hub]".'
        ) from error
    with using_hub(repo, revision, ArtifactNotFoundError, ArtifactError) as only_local:
        try:
            listing = Path(
                huggingface_hub.hf_hub_download(repo, MANIFEST, revision=revision, local_files_only=only_local)
            )
        except RemoteEntryNotFoundError as error:
            raise ArtifactNotFoundError(
                f"{repo} has no {MANIFEST}, so it is not an exported artifact; if it is a checkpoint, export it with "
                f"gemma3n-export --model {repo}."
            ) from error
        commit = listing.parent.name
        folder = cache_folder() / "hub" / repo.replace("/", "--") / commit
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{commit}.lock"):
            if not folder.is_dir():
                stage = folder.parent / f".{commit}.partial"
                _download_files(repo, commit, read_manifest(listing), stage)
                shutil.copyfile(listing, stage / MANIFEST)
                stage.rename(folder)
    return folder


def _is_reachable() -> bool:
    """Whether the Hub answers; huggingface_hub retries for 23 s before it says so."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_ANSWER_SECONDS)
    except Exception:  # the HTTP client, and so its exceptions, depend on the version of huggingface_hub
        return False
    return True


def _download_files(repo: str, commit: str, manifest: Manifest, stage: Path) -> None:
    """Downloads what is not in `stage` yet; removes a damaged file."""
    import huggingface_hub
    from huggingface_hub.errors import RemoteEntryNotFoundError

    for name, info in manifest.files.items():
        try:
            path = Path(huggingface_hub.hf_hub_download(repo, name, revision=commit, local_dir=stage))
        except RemoteEntryNotFoundError as error:
            raise ArtifactError(
                f"{repo} lacks the file {name}, which its manifest lists; ask its owner to upload the artifact again."
            ) from error
        if sha256_of(path) != info.sha256:
            path.unlink()
            raise ArtifactError(
                f"{name} of {repo} is damaged: its SHA-256 differs from the manifest's; try again, or ask its owner to "
                "upload the artifact again."
            )
    shutil.rmtree(stage / ".cache")  # written by huggingface_hub


def copy_artifact(folder: Path, output: Path) -> None:
    """Copies a folder; `output` is complete or absent. OptionError: it exists."""
    check_new(output)
    stage = output.absolute().parent / f".{output.name}.{os.getpid()}.partial"
    try:
        shutil.copytree(folder, stage)
        stage.rename(output)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def check_new(output: Path) -> None:
    """Raises OptionError if `output` exists."""
    if output.exists():
        raise OptionError(f"{output} exists already; give another output folder.")


@contextlib.contextmanager
def using_hub(
    repo: str, revision: str | None, not_found: type[Gemma3nError], failed: type[Gemma3nError]
) -> Iterator[bool]:
    """Yields whether only local files can be had, because the Hub does not answer.

    Raises the errors of huggingface_hub as `not_found`, if `repo` cannot be had at all, or as `failed`.
    """
    from huggingface_hub import errors

    try:
        yield not _is_reachable()
    except Gemma3nError:
        raise
    except errors.GatedRepoError as error:
        raise not_found(
            f"{repo} is gated; accept its licence at https://huggingface.co/{repo} "
            "and set HF_TOKEN to a token of that account."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise not_found(
            f"{repo} has no revision {revision!r}; give a branch, tag or commit listed at "
            f"https://huggingface.co/{repo}/commits."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise not_found(
            f"{repo!r} is neither a local folder nor a Hub repository that this token can access; "
            "check the spelling, or set HF_TOKEN if it is private."
        ) from error
    except (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        raise not_found(
            f"{repo} is not in the local cache and the Hub cannot be reached; "
            "check the network and HF_HUB_OFFLINE, or give a local folder."
        ) from error
    except Exception as error:  # includes those of the HTTP client
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise failed(f"{repo} could not be downloaded ({reason}); try again.") from error
