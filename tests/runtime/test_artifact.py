"""An artifact is one thing: what does not belong to its export is refused at load."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from gemma3n_onnx.runtime import ArtifactError, OnnxGemma3n
from gemma3n_onnx.runtime.artifact import EXPORT_ID, MANIFEST, load_manifest
from support import record


@pytest.fixture
def folder(small_full_artifact: Path, tmp_path: Path) -> Path:
    """A copy; its weights, which no test may write into, are hard links."""

    def copied(source: str, target: str) -> None:
        (os.link if source.endswith((".data", ".bin")) else shutil.copyfile)(source, target)

    return Path(shutil.copytree(small_full_artifact, tmp_path / "artifact", copy_function=copied))


def change_manifest(folder: Path, *keys: str, value: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    place = manifest
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_every_graph_has_the_id_of_its_manifest(folder: Path) -> None:
    manifest = load_manifest(folder)
    assert manifest.export_id
    for graph in manifest.graphs:
        assert ir.load(folder / graph.file).metadata_props[EXPORT_ID] == manifest.export_id


@pytest.mark.parametrize("modality", ["vision", "audio"])
def test_an_encoder_of_another_export_is_refused(folder: Path, modality: str) -> None:
    """Also if its checksums are in the manifest, and if it came after the model was loaded."""
    model = OnnxGemma3n.from_pretrained(folder)
    name = f"{modality}_encoder.onnx"
    other = ir.load(folder / name)
    other.metadata_props[EXPORT_ID] = "0" * 64
    (folder / name).write_bytes(ir.to_proto(other).SerializeToString())
    record(folder, name)
    for each in (model, OnnxGemma3n.from_pretrained(folder)):
        with pytest.raises(ArtifactError, match=f"{name} is of another export than the {MANIFEST}"):
            each.encoders.features(modality, {})


def test_an_artifact_without_ids_loads(folder: Path) -> None:
    """As those before format 5.2."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["export_id"]
    for name in [name for name in manifest["files"] if name.endswith(".onnx")]:
        graph = ir.load(folder / name)
        del graph.metadata_props[EXPORT_ID]
        (folder / name).write_bytes(ir.to_proto(graph).SerializeToString())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format_version": "5.1"}))
    for name in manifest["files"]:
        record(folder, name)
    assert OnnxGemma3n.from_pretrained(folder).generate("Hello", max_new_tokens=2).token_ids


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ("audio log_mel max_frequency_hz", 0),
        ("audio log_mel max_frequency_hz", 9000.0),
        ("audio log_mel min_frequency_hz", 7600.0),
        ("audio log_mel frame_length", 10**12),
        ("audio log_mel fft_length", 10**12),
        ("audio log_mel hop_length", 0),
        ("audio log_mel mel_floor", 0.0),
        ("audio log_mel mel_floor", -1e-5),
        ("audio log_mel preemphasis", 1e30),
        ("audio log_mel pad_multiple", 0),
        ("audio soft_tokens count", 10**9),
        ("vision rescale", -1.0),
        ("vision rescale", float("inf")),
        ("vision image_sizes", [0]),
        ("vision default_image_size", 255),
        ("token_embeddings scale", -8.0),
        ("token_embeddings scale", 0.0),
        ("num_layers", 10**9),
        ("max_context", 10**12),
        ("step_bytes", -1),
        ("compute_dtype", "int3"),
        ("logits", "some"),
    ],
)
def test_a_constant_out_of_range_is_refused(folder: Path, keys: str, value: Any) -> None:
    change_manifest(folder, *keys.split(), value=value)
    with pytest.raises(ArtifactError, match=rf"{keys.rsplit(maxsplit=1)[-1]} .*; export the artifact again\.$"):
        load_manifest(folder)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ("audio log_mel max_frequency_hz", 7000.0),
        ("audio log_mel mel_floor", 1e-4),
        ("vision rescale", 0.5),
        ("token_embeddings scale", 9.0),
        ("eos_token_ids", [7]),
        ("max_context", 64),
    ],
)
def test_a_constant_that_was_changed_is_refused(folder: Path, keys: str, value: Any) -> None:
    change_manifest(folder, *keys.split(), value=value)
    with pytest.raises(ArtifactError, match=r"manifest\.json was changed after the export"):
        load_manifest(folder)


@pytest.mark.parametrize("graph", ["vision", "audio"])
@pytest.mark.parametrize("part", ["inputs", "outputs"])
def test_an_encoder_without_its_inputs_or_outputs_is_refused(folder: Path, graph: str, part: str) -> None:
    change_manifest(folder, graph, "graph", part, value=[])
    with pytest.raises(ArtifactError, match=graph):
        load_manifest(folder)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "decoder.onnx.data", MANIFEST])
def test_a_link_to_a_file_elsewhere_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(ArtifactError, match=f"{name} is a link to a file elsewhere"):
        load_manifest(folder)


def test_a_file_that_the_manifest_does_not_list_is_not_read(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"]["chat_template.jinja"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / "chat_template.jinja").write_text("{{ 'of somebody else' }}")
    assert OnnxGemma3n.from_pretrained(folder).template is None


@pytest.fixture
def snapshot(small_full_artifact: Path, tmp_path: Path) -> Path:
    """The artifact as the Hugging Face cache lays it out: links to files that are named after their content."""
    repo = tmp_path / "models--maker--gemma"
    folder = repo / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted(small_full_artifact.iterdir())):
        os.link(file, repo / "blobs" / f"{number:040x}")
        (folder / file.name).symlink_to(f"../../blobs/{number:040x}")
    return folder


def test_a_snapshot_of_the_hugging_face_cache_loads(snapshot: Path, small_full_artifact: Path) -> None:
    models = [OnnxGemma3n.from_pretrained(each) for each in (snapshot, small_full_artifact)]
    ours, theirs = (model.generate("Hello", max_new_tokens=4).token_ids for model in models)
    assert ours == theirs


def test_a_snapshot_whose_link_leaves_the_repository_is_refused(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes((snapshot / "config.json").read_bytes())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../secret")
    with pytest.raises(ArtifactError, match="is a link to a file elsewhere"):
        load_manifest(snapshot)
