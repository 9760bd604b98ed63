"""What is fuzzed. A target makes a mutant in a folder, from a seed alone, and tries it.

`attempt` returns "answered" after a right answer, "refused" after the HTTP form of one of the project's errors; it
raises whatever else happens.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from gemma3n_onnx.runtime.errors import LONGEST_MESSAGE, Gemma3nError
from mutations import dumped, mutated_bytes, mutated_json

MESSAGES = [{"role": "user", "content": "Hello"}]
UNRECORDED = "unrecorded"
"""The file of a mutant whose change the manifest gives away."""


class Target(ABC):
    """`inputs`: the artifact or the checkpoint that mutants are made of."""

    name: str
    most_bytes = 1 << 30
    """What the peak of the memory may grow by."""
    most_seconds = 15.0
    """Of processor time."""

    def __init__(self, inputs: Path) -> None:
        self.inputs = inputs

    @abstractmethod
    def make(self, draw: random.Random, folder: Path) -> None: ...

    @abstractmethod
    def attempt(self, folder: Path) -> str: ...

    @abstractmethod
    def warm_up(self) -> None:
        """Imports and answers once, so that the first mutant does not pay for it."""

    def linked(self, folder: Path) -> None:
        """Fills the folder with links to the inputs, which a mutation replaces."""
        for path in self.inputs.iterdir():
            os.link(path, folder / path.name)


class Artifacts(Target):
    name = "artifact"

    def make(self, draw: random.Random, folder: Path) -> None:
        self.linked(folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        name = "manifest.json" if draw.random() < 0.5 else draw.choice([*manifest["files"]])
        path = folder / name
        weights = name.endswith((".bin", ".data"))
        recorded = draw.random() < 0.5 and not weights
        content = path.read_bytes()
        path.unlink()
        if name == "manifest.json" and draw.random() < 0.8:
            changed = mutated_json(draw, manifest)
            if recorded and isinstance(changed, dict):
                changed.pop("export_id", None)
            path.write_bytes(dumped(changed))
        elif draw.random() < 0.1:
            path.symlink_to(self.inputs / name)
            recorded = False
        elif weights:
            path.write_bytes(content[: draw.randrange(len(content))])
        else:
            path.write_bytes(mutated_bytes(draw, content))
        if recorded and name != "manifest.json":
            record(folder, name)
        if not recorded:
            (folder / UNRECORDED).touch()

    def attempt(self, folder: Path) -> str:
        from gemma3n_onnx.runtime import OnnxGemma3n

        with OnnxGemma3n.from_pretrained(folder, threads=1) as model:
            answer = model.generate(MESSAGES, max_new_tokens=3)
            model.log_likelihood("Hello", [5])
        if (folder / UNRECORDED).exists() and answer.token_ids != self.expected:
            raise AssertionError(f"a change that the manifest gives away was answered with {answer.token_ids}")
        return "answered"

    @functools.cached_property
    def expected(self) -> list[int]:
        from gemma3n_onnx.runtime import OnnxGemma3n

        with OnnxGemma3n.from_pretrained(self.inputs, threads=1) as model:
            return model.generate(MESSAGES, max_new_tokens=3).token_ids

    def warm_up(self) -> None:
        assert self.expected


class Checkpoints(Target):
    """Planning reads and checks all that a checkpoint says; the trace of what it accepts is left out."""

    name = "checkpoint"

    def make(self, draw: random.Random, folder: Path) -> None:
        self.linked(folder)
        name = draw.choice(["config.json"] * 4 + ["model.safetensors"] * 3 + sorted(os.listdir(self.inputs)))
        path = folder / name
        content = path.read_bytes()
        path.unlink()
        if name == "model.safetensors":
            path.write_bytes(_mutated_safetensors(draw, content))
        elif name.endswith(".json") and name != "tokenizer.json" and draw.random() < 0.8:
            path.write_bytes(dumped(mutated_json(draw, json.loads(content))))
        elif draw.random() < 0.1:
            path.symlink_to("/proc/self/environ")
        else:
            path.write_bytes(mutated_bytes(draw, content))

    def attempt(self, folder: Path) -> str:
        from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
        from gemma3n_onnx.export.options import ExportOptions
        from gemma3n_onnx.export.plan import plan_export

        plan_export(Checkpoint.open(folder), ExportOptions())
        return "answered"

    def warm_up(self) -> None:
        self.attempt(self.inputs)


class Media(Target):
    name = "media"

    def make(self, draw: random.Random, folder: Path) -> None:
        name, content = draw.choice(_media())
        (folder / name).write_bytes(mutated_bytes(draw, content))

    def attempt(self, folder: Path) -> str:
        from gemma3n_onnx.runtime.media.audio import load_audio
        from gemma3n_onnx.runtime.media.fetch import FetchPolicy
        from gemma3n_onnx.runtime.media.image import load_image

        (path,) = folder.iterdir()
        policy = FetchPolicy(timeout_seconds=5, max_bytes=2_000_000)
        if path.name.startswith("image"):
            load_image(path, policy)
        else:
            load_audio(path, policy, 16_000)
        return "answered"

    def warm_up(self) -> None:
        _media()


class Requests(Target):
    """Sent to the application in this process."""

    name = "request"

    def make(self, draw: random.Random, folder: Path) -> None:
        path, body = draw.choice(REQUESTS)
        content = dumped(mutated_json(draw, body))
        if draw.random() < 0.1:
            content = mutated_bytes(draw, content)
        (folder / "request.json").write_bytes(content)
        (folder / "path").write_text(path)

    def attempt(self, folder: Path) -> str:
        path, body = (folder / "path").read_text(), (folder / "request.json").read_bytes()
        answer = self.client.post(path, content=body, headers={"Content-Type": "application/json"})
        if answer.status_code < 400:
            return "answered"
        told = answer.json()["error"]
        if answer.status_code >= 500 or not told["message"]:
            raise AssertionError(f"{path} was answered with {answer.status_code}: {told}")
        return "refused"

    @functools.cached_property
    def client(self) -> Any:
        from fastapi.testclient import TestClient

        from gemma3n_onnx.runtime.serve.app import create_app
        from gemma3n_onnx.runtime.serve.model_pool import ModelPool, ServeOptions
        from gemma3n_onnx.runtime.serve.service import Limits

        pool = ModelPool([self.inputs], ServeOptions(rows=1, context=256), {"threads": 1})
        return TestClient(create_app(pool, Limits()), base_url="http://127.0.0.1")

    def warm_up(self) -> None:
        for path, body in REQUESTS:
            answer = self.client.post(path, json=body)
            assert answer.status_code == 200, (path, answer.text)


TARGETS = {target.name: target for target in (Artifacts, Checkpoints, Media, Requests)}

_SCHEMA = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
_TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": _SCHEMA}}
_SAMPLING = {"max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["\n"], "logit_bias": {"5": -1}}
REQUESTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", {"messages": MESSAGES, "n": 1, "stream": False, **_SAMPLING}),
    (
        "/v1/chat/completions",
        {"messages": MESSAGES, "max_tokens": 2, "tools": [_TOOL]},
    ),
    (
        "/v1/chat/completions",
        {
            "messages": MESSAGES,
            "max_tokens": 2,
            "response_format": {"type": "json_schema", "json_schema": {"name": "sum", "schema": _SCHEMA}},
        },
    ),
    ("/v1/completions", {"prompt": ["Hello", "You"], "logprobs": 1, **_SAMPLING}),
    ("/v1/responses", {"input": "Hello", "instructions": "Be brief.", "max_output_tokens": 2}),
    ("/v1/messages", {"model": "", "messages": MESSAGES, "max_tokens": 2, "system": "Be brief."}),
    ("/tokenize", {"content": "Hello"}),
)


def record(folder: Path, name: str) -> None:
    """`support.record` on a folder of links."""
    import support

    manifest = folder / "manifest.json"
    shutil.copyfile(manifest, folder / "copy")
    (folder / "copy").replace(manifest)
    support.record(folder, name)


def _mutated_safetensors(draw: random.Random, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    if draw.random() < 0.2:
        return mutated_bytes(draw, content)
    header = dumped(mutated_json(draw, json.loads(content[8 : 8 + length])))
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


@functools.cache
def _media() -> list[tuple[str, bytes]]:
    import io

    import numpy as np
    import soundfile
    from PIL import Image

    from media import encoded, gradient, tone

    picture = Image.fromarray(gradient(96, 64))
    made = [(f"image.{kind.lower()}", encoded(picture, kind)) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")]
    for kind in ("WAV", "FLAC", "OGG", "MP3"):
        stream = io.BytesIO()
        soundfile.write(stream, np.tile(tone(0.3), 2), 16_000, format=kind)
        made.append((f"audio.{kind.lower()}", stream.getvalue()))
    return made


def is_one_sentence(error: Gemma3nError) -> bool:
    text = str(error)
    return "\n" not in text and text.endswith(".") and len(text) <= LONGEST_MESSAGE
