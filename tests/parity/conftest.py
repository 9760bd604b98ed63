"""Checkpoints, artifacts and oracles, each made once for all parity tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

from added_tokens import grow
from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.export.checkpoint.make_checkpoint import make_checkpoint
from gemma3n_onnx.export.pipeline import ExportOptions, export
from gemma3n_onnx.runtime import OnnxGemma3n
from multimodal import MultimodalOracle
from oracle import WINDOW, NoProgress, load_oracle
from support import save_as_transformers, text_checkpoint

Exporter = Callable[..., Path]

SHALLOW = {
    "num_hidden_layers": 10,
    "num_kv_shared_layers": 5,
    "activation_sparsity_pattern": [0.95] * 3 + [0.0] * 7,
    "sliding_window": WINDOW,
}


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    """`exported(checkpoint, **ExportOptions)`: the artifact's folder; tests must not write into it."""
    done: dict[Any, Path] = {}

    def make(checkpoint: Path, **options: Any) -> Path:
        key = (checkpoint, *sorted(options.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp("artifacts") / "artifact"
            export(Checkpoint(checkpoint), folder, ExportOptions(**options), NoProgress())
            done[key] = folder
        return done[key]

    return make


@pytest.fixture(scope="session")
def shallow_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten layers, five of them sharing K and V, every feature active: for what does not depend on depth."""
    return text_checkpoint("tiny", tmp_path_factory.mktemp("checkpoint") / "shallow", overrides=SHALLOW)


@pytest.fixture(scope="session")
def tiny_oracle(tiny_checkpoint: Path) -> Gemma3nForCausalLM:
    return load_oracle(tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path, exported: Exporter) -> OnnxGemma3n:
    return OnnxGemma3n.from_pretrained(exported(tiny_checkpoint))


@pytest.fixture(scope="session")
def shallow_oracle(shallow_checkpoint: Path) -> Gemma3nForCausalLM:
    return load_oracle(shallow_checkpoint)


@pytest.fixture(scope="session")
def shallow_model(shallow_checkpoint: Path, exported: Exporter) -> OnnxGemma3n:
    return OnnxGemma3n.from_pretrained(exported(shallow_checkpoint))


@pytest.fixture(scope="session")
def untied_checkpoint(shallow_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`shallow_checkpoint` with an output head of its own."""
    config = Gemma3nTextConfig.from_pretrained(shallow_checkpoint, tie_word_embeddings=False)
    model = Gemma3nForCausalLM.from_pretrained(shallow_checkpoint, config=config, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, float(model.model.embed_tokens.weight.std()))
    return save_as_transformers(model, shallow_checkpoint, tmp_path_factory.mktemp("checkpoint") / "untied")


@pytest.fixture(scope="session")
def untied_oracle(untied_checkpoint: Path) -> Gemma3nForCausalLM:
    return load_oracle(untied_checkpoint)


@pytest.fixture(scope="session")
def grown_checkpoint(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small_checkpoint` with tokens added, as transformers adds them."""
    model = Gemma3nForCausalLM.from_pretrained(small_checkpoint, dtype=torch.float32)
    return grow(model, small_checkpoint, tmp_path_factory.mktemp("checkpoint") / "grown")


@pytest.fixture(scope="session")
def grown_oracle(grown_checkpoint: Path) -> Gemma3nForCausalLM:
    return load_oracle(grown_checkpoint)


@pytest.fixture(scope="session")
def multimodal_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """E4B's depth and reduced encoders. It is for one test; the others take the shallow one."""
    return make_checkpoint("tiny", tmp_path_factory.mktemp("checkpoint") / "multimodal")


@pytest.fixture(scope="session")
def shallow_multimodal_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`shallow_checkpoint` with reduced encoders."""
    return make_checkpoint("tiny", tmp_path_factory.mktemp("checkpoint") / "shallow_multimodal", overrides=SHALLOW)


@pytest.fixture(scope="session")
def shallow_multimodal_oracle(shallow_multimodal_checkpoint: Path) -> MultimodalOracle:
    return MultimodalOracle.load(shallow_multimodal_checkpoint)


@pytest.fixture(scope="session")
def shallow_multimodal_model(shallow_multimodal_checkpoint: Path, exported: Exporter) -> OnnxGemma3n:
    return OnnxGemma3n.from_pretrained(exported(shallow_multimodal_checkpoint))
