"""The demo, served once for each process."""

from __future__ import annotations

import pytest

from gemma3n_onnx.runtime import OnnxGemma3n
from serving import serving


@pytest.fixture(scope="session")
def server(demo_artifact):
    with serving([demo_artifact("E2B"), demo_artifact("half")]) as running:
        yield running


@pytest.fixture(scope="session")
def model(demo_artifact) -> OnnxGemma3n:
    return OnnxGemma3n.from_pretrained(demo_artifact("E2B"))
