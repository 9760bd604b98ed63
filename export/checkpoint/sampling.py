"""The sampling values of a checkpoint, which the artifact's generation_config.json keeps."""

from __future__ import annotations

from gemma3n_onnx.export.errors import CheckpointError
from gemma3n_onnx.runtime.errors import OptionError
from gemma3n_onnx.runtime.generation.defaults import GENERATION_CONFIG, SamplingDefaults

from .checkpoint import Checkpoint


def check_sampling(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a value that the runtime would refuse."""
    try:
        SamplingDefaults.from_config(checkpoint.generation_config())
    except OptionError as error:
        raise CheckpointError(f"{checkpoint.folder / GENERATION_CONFIG}: {error}") from error
