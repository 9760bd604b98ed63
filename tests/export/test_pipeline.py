"""Checkpoints of other makers give the same artifact as ours of the same weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3nForCausalLM,
    Gemma3nForConditionalGeneration,
    Gemma3nModel,
    Gemma3nTextModel,
    PreTrainedModel,
)

from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.export.checkpoint.make_checkpoint import make_checkpoint
from gemma3n_onnx.export.pipeline import ExportOptions, export
from gemma3n_onnx.export.progress import TerminalProgress
from gemma3n_onnx.runtime.artifact import EXPORT_ID, load_manifest, verify_checksums
from support import SMALL, save_as_transformers

WEIGHTS = "model.safetensors"
DATA = ("decoder.onnx.data", "token_embeddings.bin", "per_layer_embeddings.bin", "decoder.onnx", "embedding.onnx")

Tensors = dict[str, torch.Tensor]


def export_to(checkpoint: Path, folder: Path, **options: Any) -> Path:
    export(Checkpoint.open(checkpoint), folder, ExportOptions(**options), TerminalProgress(quiet=True))
    return folder


@pytest.fixture
def rewritten(small_checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the small checkpoint with other tensors and another config."""

    def make(tensors: Callable[[Tensors], Tensors], config: Callable[[dict], dict] = lambda c: c) -> Path:
        folder = tmp_path / "other"
        shutil.copytree(small_checkpoint, folder)
        save_file(tensors(load_file(folder / WEIGHTS)), folder / WEIGHTS)
        path = folder / "config.json"
        path.write_text(json.dumps(config(json.loads(path.read_text()))))
        return folder

    return make


def assert_same_artifact(artifact: Path, other: Path) -> None:
    for name in DATA:
        assert (artifact / name).read_bytes() == (other / name).read_bytes(), name


def test_a_full_checkpoint_without_its_encoders_gives_the_text_only_decoder(small_artifact, tmp_path) -> None:
    folder = make_checkpoint("tiny", tmp_path / "full", overrides=SMALL)
    full = export_to(folder, tmp_path / "artifact", modalities=("text",))
    ours, theirs = (ir.load(path / "decoder.onnx") for path in (small_artifact, full))
    assert ours.metadata_props.pop(EXPORT_ID) != theirs.metadata_props.pop(EXPORT_ID)
    assert ir.to_proto(ours) == ir.to_proto(theirs)
    for name in (DATA[0], DATA[2]):
        assert (small_artifact / name).read_bytes() == (full / name).read_bytes(), name
    text, both = ((path / "token_embeddings.bin").read_bytes() for path in (small_artifact, full))
    assert both.startswith(text)
    assert len(both) - len(text) == 256 * 64 * 4
    assert not any(name.startswith(("vision", "audio")) for name in load_manifest(full).files)


def test_keys_and_values_of_shared_layers_may_be_there_or_not(rewritten, small_artifact, tmp_path) -> None:
    def with_unused(tensors: Tensors) -> Tensors:
        donor = "model.layers.0.self_attn."
        unused = {
            name.replace("layers.0.", "layers.2."): torch.full_like(tensor, 7.0)
            for name, tensor in tensors.items()
            if name.startswith(donor) and name.removeprefix(donor).split(".")[0] in ("k_proj", "v_proj", "k_norm")
        }
        assert len(unused) == 3
        return tensors | unused

    assert_same_artifact(small_artifact, export_to(rewritten(with_unused), tmp_path / "artifact"))


def test_a_config_as_transformers_4_wrote_it(rewritten, small_artifact, tmp_path) -> None:
    def older(config: dict) -> dict:
        del config["rope_parameters"]
        return config | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "torch_dtype": "float32"}

    assert_same_artifact(small_artifact, export_to(rewritten(dict, older), tmp_path / "artifact"))


def resaved(checkpoint: Path, kind: type[PreTrainedModel], folder: Path) -> Path:
    """The checkpoint as transformers loads and saves it."""
    return save_as_transformers(kind.from_pretrained(checkpoint, dtype=torch.float32), checkpoint, folder)


@pytest.mark.parametrize(
    ("kind", "first"),
    [(Gemma3nForCausalLM, "model.embed_tokens.weight"), (Gemma3nTextModel, "embed_tokens.weight")],
)
def test_text_models_as_transformers_saves_them(kind, first, small_checkpoint, small_artifact, tmp_path) -> None:
    folder = resaved(small_checkpoint, kind, tmp_path / "other")
    assert first in load_file(folder / WEIGHTS)
    assert_same_artifact(small_artifact, export_to(folder, tmp_path / "artifact"))


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        (Gemma3nForConditionalGeneration, "model.language_model.embed_tokens.weight"),
        (Gemma3nModel, "language_model.embed_tokens.weight"),
    ],
)
def test_full_models_as_transformers_saves_them(
    kind, first, small_full_checkpoint, small_full_artifact, tmp_path
) -> None:
    folder = resaved(small_full_checkpoint, kind, tmp_path / "other")
    assert first in load_file(folder / WEIGHTS)
    artifact = export_to(folder, tmp_path / "artifact")
    assert_same_artifact(small_full_artifact, artifact)
    for name in ("vision_encoder.onnx.data", "audio_encoder.onnx.data"):
        assert (small_full_artifact / name).read_bytes() == (artifact / name).read_bytes(), name


def with_trained_copies(*modules: str) -> Callable[[Tensors], Tensors]:
    """Names as PEFT gives them with these `modules_to_save`."""

    def wrapped(tensors: Tensors) -> Tensors:
        found = {}
        for name, tensor in tensors.items():
            module, _, parameter = f"base_model.model.{name}".rpartition(".")
            if name.removesuffix(".weight") in modules:
                found[f"{module}.original_module.{parameter}"] = torch.full_like(tensor, 7.0)
                module += ".modules_to_save.default"
            found[f"{module}.{parameter}"] = tensor
        return found

    return wrapped


def test_names_of_peft_are_read(rewritten, small_artifact, tmp_path) -> None:
    folder = rewritten(with_trained_copies("model.embed_tokens", "model.layers.1.mlp.up_proj"))
    assert_same_artifact(small_artifact, export_to(folder, tmp_path / "artifact"))


def test_other_rope_bases_reach_the_graph(rewritten, small_artifact, tmp_path) -> None:
    def other_base(config: dict) -> dict:
        del config["rope_parameters"]
        return config | {"rope_theta": 5e5}

    other = export_to(rewritten(dict, other_base), tmp_path / "artifact")
    assert (other / "decoder.onnx.data").read_bytes() == (small_artifact / "decoder.onnx.data").read_bytes()
    assert (other / "decoder.onnx").read_bytes() != (small_artifact / "decoder.onnx").read_bytes()


def test_an_export_is_reproducible_and_its_checksums_hold(small_checkpoint, small_artifact, tmp_path) -> None:
    again = export_to(small_checkpoint, tmp_path / "artifact")
    assert_same_artifact(small_artifact, again)
    verify_checksums(again, load_manifest(again))


def test_the_head_is_the_token_table(small_artifact) -> None:
    import onnx

    model = onnx.load(small_artifact / "decoder.onnx", load_external_data=False)
    head = next(tensor for tensor in model.graph.initializer if tensor.name == "lm_head.weight")
    external = {entry.key: entry.value for entry in head.external_data}
    assert external["location"] == "token_embeddings.bin"
    assert int(external["length"]) == (small_artifact / "token_embeddings.bin").stat().st_size
