"""Configs in the spellings that checkpoints have, as transformers reads them."""

from typing import Any

import pytest
from transformers import Gemma3nTextConfig

from gemma3n_onnx.export.checkpoint.make_checkpoint import text_config
from gemma3n_onnx.graphs.config import FULL, SLIDING, ConfigError, TextConfig

HF = text_config("tiny", "float32", {})[0]
DEFAULT = {"rope_type": "default"}


def with_rope(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in HF.items() if key != "rope_parameters"} | values


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": DEFAULT},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_theta": 5e5, "rope_scaling": DEFAULT | {"rope_theta": 7e5}},
        {"rope_parameters": None},
        {"rope_parameters": {FULL: DEFAULT | {"rope_theta": 5e5}, SLIDING: DEFAULT | {"rope_theta": 2e4}}},
        {"rope_parameters": {FULL: {"rope_theta": 5e5}, SLIDING: {"rope_theta": 2e4}}},
        {"rope_parameters": {FULL: DEFAULT | {"rope_theta": 5e5}}},
        {"rope_parameters": {FULL: DEFAULT, SLIDING: None}, "rope_theta": 5e5, "rope_local_base_freq": 2e4},
        {"rope_parameters": {FULL: DEFAULT, SLIDING: DEFAULT}, "rope_scaling": DEFAULT | {"rope_theta": 7e5}},
        {"rope_parameters": DEFAULT | {"rope_theta": 5e5}},
    ],
)
def test_rope_bases_are_transformers(rope: dict[str, Any]) -> None:
    theirs = Gemma3nTextConfig(**with_rope(**rope)).rope_parameters
    for kind, theta in TextConfig.from_hf(with_rope(**rope)).rope_theta.items():
        assert theirs[kind]["rope_type"] == "default"
        assert theta == theirs[kind]["rope_theta"]


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "full_attention layers is 'linear'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "full_attention layers is 'dynamic'"),
        ({"rope_parameters": {SLIDING: {"rope_type": "yarn", "factor": 2.0}}}, "sliding_attention layers is 'yarn'"),
        ({"rope_scaling": "default"}, "wrong type"),
    ],
)
def test_scaled_rope_is_refused(rope: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        TextConfig.from_hf(with_rope(**rope))


def test_a_full_config_implies_the_kind_of_its_text_config() -> None:
    text = {key: value for key, value in HF.items() if key != "model_type"}
    assert TextConfig.from_hf({"model_type": "gemma3n", "text_config": text}) == TextConfig.from_hf(HF)
    for config in ({"text_config": text}, {"model_type": "gemma3", "text_config": text}, text):
        with pytest.raises(ConfigError, match="model_type is None"):
            TextConfig.from_hf(config)
