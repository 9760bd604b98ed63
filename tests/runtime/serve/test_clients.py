"""The checks of `tests/clients` that need no other package than the tests: those of OpenAI's client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma3n_onnx.runtime.serve.app import Access
from serving import DEMO, E2B, serving

CLIENTS = Path(__file__).parents[2] / "clients" / "python"


@pytest.mark.parametrize("name", ["openai_client", "openai_responses"])
def test_openais_client(name, demo_artifact):
    with serving([demo_artifact("E2B")], access=Access(api_key="secret")) as running:
        where = {
            "CLIENTS_URL": running.url,
            "CLIENTS_KEY": "secret",
            "CLIENTS_MODEL": E2B,
            "CLIENTS_FILES_URL": "",
            "CLIENTS_DEMO": str(DEMO),
        }
        command = [sys.executable, CLIENTS / f"{name}.py"]
        told = subprocess.run(command, check=True, env={**os.environ, **where}, capture_output=True, text=True).stdout
    rows = [json.loads(line) for line in told.splitlines()]
    assert rows and not [f"{row['feature']}: {row['why']}" for row in rows if row["result"] == "failed"]
