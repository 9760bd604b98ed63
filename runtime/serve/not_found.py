"""Errors about things that the server does not have."""

from __future__ import annotations

from gemma3n_onnx.runtime.errors import Gemma3nError


class NotFoundError(Gemma3nError, KeyError):
    """The server has no such thing."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would quote it


class UnknownModelError(NotFoundError):
    """The server offers no model of this name."""
