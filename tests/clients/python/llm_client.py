"""Simon Willison's llm, on its command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import (
    ADD,
    BASE,
    COUNT,
    COUNT_ANSWER,
    HEAR,
    HEAR_ANSWER,
    KEY,
    MODEL,
    PICTURE,
    SEE,
    SEE_ANSWER,
    SOUND,
    SUM,
    SUM_ANSWER,
    TRIP,
    Checks,
    is_sum,
    is_trip,
)

check = Checks("llm", "llm")
folder = Path(tempfile.mkdtemp())
COMMAND = [Path(sys.executable).with_name("llm"), "prompt"]
FUNCTION = 'def add(a: int, b: int) -> int:\n    "Adds two numbers."\n    return a + b\n'
MODELS = [
    {
        "model_id": name,
        "model_name": served,
        "api_base": BASE,
        "api_key_name": "local",
        "vision": True,
        "audio": True,
        "supports_schema": True,
        "supports_tools": True,
    }
    for name, served in (("local", MODEL), ("unknown", "other"))
]
# JSON is YAML, too.
folder.joinpath("extra-openai-models.yaml").write_text(json.dumps(MODELS))
folder.joinpath("keys.json").write_text(json.dumps({"local": KEY}))


def run(*arguments, model: str = "local") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "-m", model, *arguments],
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "LLM_USER_PATH": str(folder)},
    )


def ask(*arguments) -> str:
    done = run(*arguments, "-o", "temperature", "0")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@check("text")
def _() -> None:
    assert ask(SUM, "--no-stream") == SUM_ANSWER
    assert ask(SUM, "--system", "Be brief.")


@check("stream")
def _() -> None:
    assert ask(SUM) == SUM_ANSWER


@check("image")
def _() -> None:
    assert ask(SEE, "-a", PICTURE) == SEE_ANSWER


@check("audio")
def _() -> None:
    # It sends text before attachments, and the demo has learned to answer text after sound.
    ask(HEAR, "-a", SOUND)
    assert ask(HEAR, "-c") == HEAR_ANSWER


@check("tools offered")
def _() -> None:
    assert ask(SUM, "--functions", FUNCTION)


check.cannot("tools forced", "it leaves the choice to the model")
check.cannot("parallel tools", "it leaves the choice to the model")
check.cannot("nested tools", "it leaves the choice to the model")


@check("structured")
def _() -> None:
    assert is_sum(ask(SUM, "--schema", json.dumps(ADD)))
    assert is_trip(ask(SUM, "--schema", json.dumps(TRIP)))


@check("errors")
def _() -> None:
    for done in (run(SUM, model="unknown"), run(SUM, "-o", "logit_bias", '{"99999999": 1}')):
        assert done.returncode == 1 and done.stderr.startswith("Error: ")


@check("history")
def _() -> None:
    ask(SEE, "-a", PICTURE)
    assert ask(COUNT, "-c") == COUNT_ANSWER
