"""Sampling values of generation_config.json beside transformers' reading of the same file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from gemma3n_onnx.runtime.errors import ArtifactError
from gemma3n_onnx.runtime.generation.defaults import GENERATION_CONFIG, SamplingDefaults
from gemma3n_onnx.runtime.generation.options import GenerationOptions
from gemma3n_onnx.runtime.options import split_options

GEMMA = {"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0, "do_sample": True, "top_k": 64, "top_p": 0.95}


def of_transformers(folder: Path) -> dict[str, Any]:
    """What `generate` uses: the file, then transformers' own defaults for what it does not say."""
    config = GenerationConfig.from_pretrained(folder)
    config.update(**config._get_default_generation_params(), defaults_only=True)
    read = {name: getattr(config, name) for name in SamplingDefaults.__dataclass_fields__}
    if not config.do_sample:
        return {"repetition_penalty": read["repetition_penalty"] or 1.0, "temperature": 0.0}
    return read


@pytest.mark.parametrize(
    "config",
    [
        {},
        GEMMA,
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "min_p": 0.05},
        {"do_sample": True, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.1},
        {"do_sample": False, "repetition_penalty": 1.2},
        {"do_sample": None, "top_k": None},
    ],
    ids=json.dumps,
)
def test_the_values_are_those_of_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / GENERATION_CONFIG).write_text(json.dumps(config))
    ours, theirs = asdict(SamplingDefaults.from_folder(tmp_path)), of_transformers(tmp_path)
    off: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": None}
    for name, value in theirs.items():
        assert ours[name] == (None if name in off and value == off[name] and ours[name] is None else value), name


def test_an_artifact_without_the_file_is_greedy(tmp_path: Path) -> None:
    assert SamplingDefaults.from_folder(tmp_path) == SamplingDefaults()
    assert GenerationOptions(**asdict(SamplingDefaults())) == GenerationOptions()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"top_k": "many"}', "top_k must be a whole number of at least 1, not 'many'"),
        ('{"do_sample": true, "top_p": 7}', "top_p must be a number above 0 and up to 1, not 7"),
        ('{"do_sample": "yes"}', "do_sample must be true or false, not 'yes'"),
    ],
)
def test_a_file_that_cannot_be_used(content: str, says: str, tmp_path: Path) -> None:
    (path := tmp_path / GENERATION_CONFIG).write_text(content)
    with pytest.raises(ArtifactError) as caught:
        SamplingDefaults.from_folder(tmp_path)
    assert str(path) in str(caught.value) and says in str(caught.value)


def test_a_call_takes_the_values_of_the_checkpoint_where_it_has_none() -> None:
    defaults = SamplingDefaults.from_config(GEMMA)
    greedy = split_options({"top_k": 3}, defaults)[0]
    assert (greedy.temperature, greedy.top_k, greedy.top_p) == (0.0, 3, None)
    asked = split_options({"sampling": "default"}, defaults)[0]
    assert (asked.temperature, asked.top_k, asked.top_p) == (1.0, 64, 0.95)
    mixed = split_options({"sampling": "default", "temperature": 0.5, "top_k": None}, defaults)[0]
    assert (mixed.temperature, mixed.top_k, mixed.top_p) == (0.5, None, 0.95)
