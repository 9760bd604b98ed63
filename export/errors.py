"""Errors that a user of the exporter can cause."""

from gemma3n_onnx.runtime.errors import Gemma3nError


class CheckpointError(Gemma3nError, ValueError):
    """The checkpoint cannot be read, or is not a Gemma 3n checkpoint."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the given path, or it may not be downloaded."""


class SliceError(Gemma3nError, ValueError):
    """The slice is unknown, malformed, or breaks a rule of the architecture."""


class ExportError(Gemma3nError, RuntimeError):
    """The artifact cannot be written."""


class ExportOptionError(ExportError, ValueError):
    """The options contradict each other or the checkpoint."""
