"""Fixtures that several rooms' tests share."""

from pathlib import Path

import pytest
from gemma3n_onnx.export.make_checkpoint import make_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-only checkpoint of E4B's depth with every feature, a few MB; tests must not write into it."""
    return make_checkpoint("tiny", tmp_path_factory.mktemp("checkpoint") / "tiny")
