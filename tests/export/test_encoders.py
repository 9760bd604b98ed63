"""Which encoders an export takes along, and what it says of a checkpoint whose encoders do not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma3n_onnx.export.checkpoint.checkpoint import Checkpoint
from gemma3n_onnx.export.checkpoint.make_checkpoint import make_checkpoint
from gemma3n_onnx.export.checkpoint.processor import read_front_ends
from gemma3n_onnx.export.encoders import choose_modalities, find_encoders, find_hard_tokens, hard_row_values
from gemma3n_onnx.export.errors import CheckpointError, ExportOptionError
from support import SMALL

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("tiny", tmp_path_factory.mktemp("full") / "full", overrides=SMALL)


@pytest.fixture
def edited(full: Path, tmp_path: Path) -> Callable[..., Checkpoint]:
    """The full checkpoint with tensors and JSON files changed."""

    def make(tensors: Edit | None = None, config: Edit | None = None, processor: Edit | None = None) -> Checkpoint:
        folder = tmp_path / "edited"
        shutil.copytree(full, folder)
        if tensors is not None:
            weights = load_file(folder / "model.safetensors")
            tensors(weights)
            save_file(weights, folder / "model.safetensors")
        for name, change in (("config.json", config), ("preprocessor_config.json", processor)):
            if change is not None:
                content = json.loads((folder / name).read_text())
                change(content)
                (folder / name).write_text(json.dumps(content))
        return Checkpoint.open(folder)

    return make


def test_a_full_checkpoint_has_all_modalities_and_any_may_be_chosen(full: Path) -> None:
    checkpoint = Checkpoint.open(full)
    checkpoint.check_all_known()
    assert choose_modalities(None, checkpoint) == ("text", "vision", "audio")
    assert choose_modalities(["audio"], checkpoint) == ("text", "audio")
    assert choose_modalities(["vision", "text"], checkpoint) == ("text", "vision")
    assert list(find_encoders(checkpoint, ["text", "audio"])) == ["audio"]


def test_what_a_text_only_checkpoint_lacks_is_said(small_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(small_checkpoint)
    assert choose_modalities(None, checkpoint) == ("text",)
    assert find_hard_tokens(checkpoint) is None
    with pytest.raises(ExportOptionError, match="has no audio: it holds text"):
        choose_modalities(["audio", "text"], checkpoint)


def test_every_tensor_of_both_encoders_is_used(full: Path) -> None:
    checkpoint = Checkpoint.open(full)
    encoders = find_encoders(checkpoint, checkpoint.modalities)
    used = {checkpoint.encoder_raw_name(name) for encoder in encoders.values() for name in encoder.shapes}
    assert used == {name for name in checkpoint.names if not name.startswith(checkpoint.naming.text)}
    assert sum(name.startswith("model.vision_tower.") for name in used) == 548


def test_hard_rows_are_the_embedders_in_the_order_of_their_ids(full: Path) -> None:
    checkpoint = Checkpoint.open(full)
    tokens = find_hard_tokens(checkpoint)
    assert tokens is not None
    assert (tokens.rows.first_id, tokens.rows.count) == (1024, 256)
    assert list(tokens.embedders) == ["embed_vision", "embed_audio"]
    rows = np.concatenate(list(hard_row_values(checkpoint, tokens))) * checkpoint.text_config.hidden_size**0.5
    np.testing.assert_allclose((rows**2).mean(1), 1.0, rtol=1e-4)  # the last norm has no weight
    assert len(np.unique(rows, axis=0)) == 256


@pytest.mark.parametrize(("vocab", "count"), [(1024, None), (1100, 76), (1152, 128), (1200, 176), (1280, 256)])
def test_a_smaller_vocabulary_has_fewer_hard_rows(full: Path, edited, vocab: int, count: int | None) -> None:
    whole = Checkpoint.open(full)
    fewer = edited(tensors=cut_rows(vocab), config=put(vocab, "text_config", "vocab_size"))
    tokens, all_tokens = find_hard_tokens(fewer), find_hard_tokens(whole)
    assert (tokens and tokens.rows.count) == count
    if tokens is not None and all_tokens is not None:
        rows, all_rows = (np.concatenate([*hard_row_values(c, t)]) for c, t in ((fewer, tokens), (whole, all_tokens)))
        np.testing.assert_array_equal(rows, all_rows[:count])


def test_media_whose_tokens_the_vocabulary_lacks_are_refused(edited) -> None:
    checkpoint = edited(tensors=cut_rows(1100), config=put(1100, "text_config", "vocab_size"))
    assert list(read_front_ends(checkpoint, ["text", "vision"]).soft_tokens) == ["vision"]
    with pytest.raises(CheckpointError, match=r"audio_token_id is 1,153, but .* 1,100 ids; leave audio out"):
        read_front_ends(checkpoint, ["text", "vision", "audio"])


def read_all(checkpoint: Checkpoint) -> None:
    find_encoders(checkpoint, checkpoint.modalities)
    find_hard_tokens(checkpoint)
    read_front_ends(checkpoint, checkpoint.modalities)


def drop(name: str) -> Edit:
    return lambda content: content.pop(name)


def put(value: Any, *path: str) -> Edit:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def cut_rows(count: int) -> Edit:
    name = "model.language_model.embed_tokens.weight"
    return lambda weights: put(weights[name][:count].clone(), name)(weights)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ({"tensors": drop("model.vision_tower.timm_model.conv_stem.conv.weight")}, "no tensor .*conv_stem"),
        ({"tensors": drop("model.embed_audio.embedding.weight")}, "no tensor .*embed_audio"),
        ({"tensors": put(torch.ones(2), "model.audio_tower.extra")}, "audio_tower.extra"),
        ({"tensors": put(torch.ones(2), "model.embed_vision.hard_embedding_norm.weight")}, r"shape \[2\]"),
        ({"config": drop("vision_config")}, "vision_config"),
        ({"config": put("resnet50", "vision_config", "architecture")}, "resnet50"),
        ({"config": put(3, "audio_config", "conf_num_hidden_layers")}, "no tensor .*conformer"),
        ({"config": put(32, "audio_config", "hidden_size")}, "shape"),
        ({"config": put(7, "vision_config", "vocab_offset")}, "vision_config has vocab_offset 7 instead of 1024"),
        ({"config": put("x", "vision_config", "vocab_size")}, "vocab_size is 'x'"),
        ({"config": drop("image_token_id")}, "image_token_id"),
        ({"config": put(10**6, "boa_token_id")}, "boa_token_id"),
        ({"config": put(0, "audio_soft_tokens_per_image")}, "audio_soft_tokens_per_image"),
        ({"tensors": cut_rows(1100), "config": put(1100, "text_config", "vocab_size")}, "ids begin at 1152"),
        ({"processor": put(True, "do_normalize")}, "do_normalize True"),
        ({"processor": put(3, "resample")}, "resample 3"),
        ({"processor": put({"height": 224, "width": 224}, "size")}, "256, 512, 768"),
        ({"processor": put({"height": 256, "width": 512}, "size")}, "256, 512, 768"),
        ({"processor": put(0.1, "dither")}, "dither 0.1"),
        ({"processor": put([1.0] * 128, "per_bin_mean")}, "per_bin_mean"),
        ({"processor": put("fast", "hop_length")}, "cannot be used"),
    ],
)
def test_encoders_that_do_not_fit_are_refused_with_the_reason(edited, what: dict[str, Edit], reason: str) -> None:
    checkpoint = edited(**what)
    with pytest.raises(CheckpointError, match=reason):
        read_all(checkpoint)


def test_tensors_of_nothing_known_are_named(edited) -> None:
    checkpoint = edited(tensors=put(torch.ones(2), "model.projector.weight"))
    with pytest.raises(CheckpointError, match=r"model\.projector\.weight"):
        checkpoint.check_all_known()


def test_processor_settings_are_read_in_both_spellings(full: Path, edited) -> None:
    flat = read_front_ends(Checkpoint.open(full), ["vision", "audio"])
    folder = edited().folder
    content = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    assert read_front_ends(Checkpoint.open(folder), ["vision", "audio"]) == flat  # the defaults
    nested = {"image_processor": content | {"size": {"height": 512, "width": 512}}, "feature_extractor": content}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    read = read_front_ends(Checkpoint.open(folder), ["vision", "audio"])
    assert read.image is not None and flat.image is not None
    assert (flat.image.size, read.image.size) == (768, 512)
    assert read.log_mel == flat.log_mel


def test_only_chosen_modalities_are_read(full: Path) -> None:
    front_ends = read_front_ends(Checkpoint.open(full), ["text", "audio"])
    assert front_ends.image is None
    assert list(front_ends.soft_tokens) == ["audio"]
    soft = front_ends.soft_tokens["audio"]
    assert (soft.token, soft.count, soft.prefix) == ("<audio_soft_token>", 188, "\n\n<start_of_audio>")
    assert soft.suffix == "<end_of_audio>\n\n"
