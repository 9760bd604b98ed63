"""The scorer: loaded when needed, refused where it cannot be, and freed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.export.pipeline import ExportOptions, export
from gemma3n_onnx.export.progress import TerminalProgress
from gemma3n_onnx.runtime import ArtifactError, OnnxGemma3n, ProviderError
from gemma3n_onnx.runtime.tokens import PromptTokens

TEXT = [2, 5, 6, 7]


@pytest.fixture(scope="module")
def int8(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "artifact"
    export(Checkpoint.open(small_checkpoint), folder, ExportOptions(precision="int8"), TerminalProgress(quiet=True))
    return folder


def test_an_artifact_without_a_scorer_loads_and_says_what_to_do(small_artifact: Path, tmp_path: Path) -> None:
    """As those before format 5.1."""
    old = shutil.copytree(small_artifact, tmp_path / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    (old / manifest["scorer"]["file"]).unlink()
    del manifest["files"][manifest["scorer"]["file"]], manifest["scorer"], manifest["export_id"]
    (old / "manifest.json").write_text(json.dumps(manifest | {"format_version": "5.0"}))
    model = OnnxGemma3n.from_pretrained(old)
    assert model.generate(TEXT, max_new_tokens=2).token_ids
    with pytest.raises(ArtifactError, match="no graph that scores given text; export it again"):
        model.log_likelihood(TEXT, [8])


def test_weights_that_would_take_memory_twice_need_room_for_it(int8: Path, small_artifact: Path) -> None:
    size = OnnxGemma3n.from_pretrained(int8).manifest.step_bytes
    assert OnnxGemma3n.from_pretrained(int8, memory_budget=2 * size).log_likelihood(TEXT, [8]).tokens
    with pytest.raises(ProviderError, match=r"Scoring text takes .* GB more for the weights, but 0 GB are free"):
        OnnxGemma3n.from_pretrained(int8, memory_budget=size).log_likelihood(TEXT, [8])
    assert OnnxGemma3n.from_pretrained(small_artifact, memory_budget=0).log_likelihood(TEXT, [8]).tokens


def test_one_token_has_nothing_to_score(small_artifact: Path) -> None:
    scores = OnnxGemma3n.from_pretrained(small_artifact).engine.score(PromptTokens([2]), 1)
    assert scores.logprobs.shape == (0,) and scores.top_ids.shape == (0, 20)


def test_release_frees_it(small_artifact: Path) -> None:
    model = OnnxGemma3n.from_pretrained(small_artifact)
    first = model.log_likelihood(TEXT, [8, 9])
    scorer = model.engine._scorer
    assert scorer.session is not None and scorer.keys
    model.release()
    assert scorer.session is None and scorer.cache is None and not scorer.keys
    assert model.log_likelihood(TEXT, [8, 9]) == first
