"""What the Python clients share: the server's address, questions with their answers, and a record of what works."""

from __future__ import annotations

import base64
import json
import os
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

URL = os.environ["CLIENTS_URL"]
BASE = f"{URL}/v1"
KEY = os.environ["CLIENTS_KEY"]
MODEL = os.environ["CLIENTS_MODEL"]
FILES_URL = os.environ["CLIENTS_FILES_URL"]

DEMO = Path(os.environ["CLIENTS_DEMO"])
PICTURE, SOUND = DEMO / "picture.png", DEMO / "sound.wav"
PICTURE_BASE64, SOUND_BASE64 = (base64.b64encode(path.read_bytes()).decode() for path in (PICTURE, SOUND))
PICTURE_URL = f"data:image/png;base64,{PICTURE_BASE64}"

SUM, SUM_ANSWER = "What is 3 plus 4?", "3 plus 4 is 7."
SEE, SEE_ANSWER = "What is in the picture?", "A red circle, a yellow star and a blue square."
COUNT, COUNT_ANSWER = "How many shapes are there?", "A red circle and a yellow star and a blue square: three shapes."
HEAR, HEAR_ANSWER = "What do you hear?", "Three high beeps."

# Parts and tools of chat completions.
IMAGE = {"type": "image_url", "image_url": {"url": PICTURE_URL}}
AUDIO = {"type": "input_audio", "input_audio": {"data": SOUND_BASE64, "format": "wav"}}

DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
ADD = {"type": "object", "properties": {"a": DIGIT, "b": DIGIT}, "required": ["a", "b"], "additionalProperties": False}
# What pydantic writes for a model with two fields of another model.
STOP = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"], "type": "string"}, "nights": DIGIT},
    "required": ["city", "nights"],
    "additionalProperties": False,
}
TRIP = {
    "type": "object",
    "properties": {
        "home": {"$ref": "#/$defs/Stop"},
        "stops": {"type": "array", "items": {"$ref": "#/$defs/Stop"}, "maxItems": 2},
    },
    "required": ["home", "stops"],
    "additionalProperties": False,
    "$defs": {"Stop": STOP},
}


def tool(name: str, parameters: dict) -> dict:
    """A function in the form of chat completions."""
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


def is_sum(arguments: str | dict) -> bool:
    """Whether these are arguments of the tool `add`."""
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    return given.keys() == {"a", "b"} and all(0 <= value <= 9 for value in given.values())


def is_trip(arguments: str | dict) -> bool:
    """Whether these are arguments that match `TRIP`, or the model of this name."""
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    rest = given["stops"] if "stops" in given else [given["away"]]
    return all(stop["city"] in ("Rome", "Oslo") and 0 <= stop["nights"] <= 9 for stop in (given["home"], *rest))


def raised(kind: type[Exception], call: Callable[..., object], *given, **options) -> Exception:
    """The error of this kind that a call raises."""
    try:
        call(*given, **options)
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


class Checks:
    """The row of one client in the table: each check is run as it is defined, and its result is printed."""

    def __init__(self, client: str, package: str, release: str | None = None) -> None:
        """`release`: the version to print, if `package` is not one of Python."""
        self._client, self._version = client, release or version(package)

    def __call__(self, feature: str) -> Callable[[Callable[[], None]], None]:
        def run(check: Callable[[], None]) -> None:
            try:
                check()
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[1]
                self._print(feature, "failed", f"{type(error).__name__}: {error} ({place.line})"[:400])
            else:
                self._print(feature, "ok")

        return run

    def cannot(self, feature: str, why: str) -> None:
        """The client has no such feature."""
        self._print(feature, "none", why)

    def _print(self, feature: str, result: str, why: str = "") -> None:
        row = {"client": self._client, "version": self._version, "feature": feature, "result": result, "why": why}
        print(json.dumps(row), flush=True)
