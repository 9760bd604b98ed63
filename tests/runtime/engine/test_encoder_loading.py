"""Encoders are loaded when a request first needs them, freed on demand, and cost a text-only run nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.export.pipeline import ExportOptions, export
from gemma3n_onnx.export.progress import TerminalProgress
from gemma3n_onnx.runtime import ClosedError, MediaError, OnnxGemma3n, OptionError
from gemma3n_onnx.runtime.engine import encoders
from gemma3n_onnx.runtime.system import mapped_files
from media import RATE_HZ, photo, tone

IMAGE = {"type": "image", "image": photo()}
CLIP = {"type": "audio", "audio": (tone(0.5), RATE_HZ)}
MIB = 2**20


def ask(model, *content):
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]}]
    return model.generate(messages, max_new_tokens=4, image_size=256).token_ids


def mapped(folder):
    """The encoders whose weights are mapped from this folder."""
    files = mapped_files()
    return {name for name in ("vision", "audio") if any(f"{folder}/{name}_encoder.onnx" in file for file in files)}


def exported(checkpoint, folder, *modalities):
    options = ExportOptions(modalities=modalities)
    export(Checkpoint.open(checkpoint), folder, options, TerminalProgress(quiet=True))
    return folder


@pytest.fixture
def folder(small_full_artifact, tmp_path):
    """Under a name of its own: other tests map the same files."""
    return Path(shutil.copytree(small_full_artifact, tmp_path / "artifact", copy_function=os.link))


@pytest.fixture
def loaded(monkeypatch):
    """The encoder graphs that become sessions, in order."""
    names, session = [], encoders.Session

    def recording(path, *arguments, **options):
        names.append(path.name)
        return session(path, *arguments, **options)

    monkeypatch.setattr(encoders, "Session", recording)
    return names


def test_a_text_only_run_loads_no_encoder(folder, loaded):
    model = OnnxGemma3n.from_pretrained(folder)
    ask(model)
    model.chat().send("What is it?", max_new_tokens=4)
    assert loaded == [] and model.encoders.loaded == () and mapped(folder) == set()


def test_each_encoder_is_loaded_by_the_first_request_that_needs_it(folder, loaded):
    model = OnnxGemma3n.from_pretrained(folder)
    ask(model, IMAGE)
    assert loaded == ["vision_encoder.onnx"] and mapped(folder) == {"vision"}
    ask(model, IMAGE, IMAGE)
    ask(model, CLIP)
    ask(model, IMAGE, CLIP)
    assert loaded == ["vision_encoder.onnx", "audio_encoder.onnx"] and mapped(folder) == {"vision", "audio"}


@pytest.mark.parametrize("released", ["vision", "audio", None])
def test_a_released_encoder_is_unmapped_and_loads_again(folder, loaded, released):
    model = OnnxGemma3n.from_pretrained(folder, prefix_cache_size=0)
    before = ask(model, IMAGE, CLIP)
    model.release(released)
    left = {"vision", "audio"} - ({released} if released else {"vision", "audio"})
    assert mapped(folder) == set(model.encoders.loaded) == left
    assert ask(model, IMAGE, CLIP) == before
    assert mapped(folder) == {"vision", "audio"} and len(loaded) == 4 - len(left)


def test_releasing_what_is_not_loaded_does_nothing_and_an_unknown_name_is_told(folder):
    model = OnnxGemma3n.from_pretrained(folder)
    model.release()
    model.release("audio")
    with pytest.raises(OptionError, match="'speech'; release vision or audio"):
        model.release("speech")


def test_a_stream_that_outlives_its_model_loads_no_encoder(folder, loaded):
    with OnnxGemma3n.from_pretrained(folder) as model:
        stream = model.stream([{"role": "user", "content": [IMAGE]}], image_size=256)
    with pytest.raises(ClosedError):
        next(stream)
    assert loaded == []


def test_an_artifact_says_which_modality_it_lacks(small_full_checkpoint, tmp_path):
    lacks = {("text",): {"vision", "audio"}, ("text", "vision"): {"audio"}, ("text", "audio"): {"vision"}}
    for modalities, missing in lacks.items():
        model = OnnxGemma3n.from_pretrained(
            exported(small_full_checkpoint, tmp_path / "-".join(modalities), *modalities)
        )
        assert model.manifest.modalities == modalities
        assert {name for name in ("vision", "audio") if f"{name}_encoder.onnx" in model.manifest.files} == {
            "vision",
            "audio",
        } - missing
        for name, part in (("vision", IMAGE), ("audio", CLIP)):
            if name not in missing:
                assert len(ask(model, part)) == 4
                continue
            with pytest.raises(MediaError) as raised:
                ask(model, part)
            print(raised.value)
            assert f"no {name} encoder" in str(raised.value)
            assert f"--modalities {','.join(modalities)},{name}" in str(raised.value)
        ask(model)


MEASURE = """
import json, sys, threading, time
import numpy as np
from gemma3n_onnx.runtime import OnnxGemma3n
from gemma3n_onnx.runtime.system import peak_memory_bytes, private_memory_bytes

private, running = 0, True
def watch():
    global private
    while running:
        private = max(private, private_memory_bytes())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
model = OnnxGemma3n.from_pretrained(sys.argv[1], threads=1)
content = [{"type": "text", "text": "Which river is the longest, and where does it meet the sea?"}]
if sys.argv[2] == "media":
    content.append({"type": "image", "image": np.full((9, 9), 0.5)})
    content.append({"type": "audio", "audio": (np.sin(np.arange(8000)), 16000)})
answer = model.generate([{"role": "user", "content": content}], max_new_tokens=32, image_size=256)
running = False
watcher.join()
print(json.dumps({"private": private, "resident": peak_memory_bytes(), "tokens": answer.token_ids}))
"""


def measured(folder, what):
    command = [sys.executable, "-c", MEASURE, str(folder), what]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def test_a_text_only_run_takes_no_more_memory_with_encoders_than_without(
    small_full_checkpoint, small_full_artifact, tmp_path
):
    without = measured(exported(small_full_checkpoint, tmp_path / "text", "text"), "text")
    there, used = (measured(small_full_artifact, what) for what in ("text", "media"))
    assert there["tokens"] == without["tokens"]
    for key in ("private", "resident"):
        print(
            f"{key} peak: {without[key] / MIB:.1f} MiB without encoders, {there[key] / MIB:.1f} with encoders that are "
            f"not used, {used[key] / MIB:.1f} with both in use"
        )
        assert abs(there[key] - without[key]) < 8 * MIB
        assert used[key] - without[key] > 16 * MIB, "too little to notice"
