"""Whatever a user gets wrong is one sentence that names it, and leaves the disk as it was."""

import builtins
import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from gemma3n_onnx.export import trace
from gemma3n_onnx.export.checkpoint import hub
from gemma3n_onnx.export.writer import HashedFile
from gemma3n_onnx.runtime import Gemma3nError, OnnxGemma3n, OptionError, PromptError
from gemma3n_onnx.runtime.engine.providers.select import choices
from gemma3n_onnx.runtime.errors import ArtifactNotFoundError, ContextLengthError
from support import SMALL, record, run_command, text_checkpoint

WEIGHTS = "model.safetensors"
STEPS = ("Tracing the decoder", "Writing weights")


@dataclass
class World:
    """A folder of its own, which is also the current one, with what a case puts there."""

    folder: Path
    small_checkpoint: Path
    small_artifact: Path
    patch: pytest.MonkeyPatch

    def checkpoint(self, edit: Callable[[Path], Any] | None = None) -> str:
        return self._copy(self.small_checkpoint, "checkpoint", edit)

    def artifact(self, edit: Callable[[Path], Any] | None = None, name: str = "artifact") -> str:
        return self._copy(self.small_artifact, name, edit)

    def file(self, name: str, content: str | bytes = "") -> str:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def _copy(self, source: Path, name: str, edit: Callable[[Path], Any] | None) -> str:
        shutil.copytree(source, self.folder / name)
        if edit is not None:
            edit(self.folder / name)
        return str(self.folder / name)


@dataclass(frozen=True)
class Case:
    """`arrange` sets the world up and gives the command; `says` are parts of the message."""

    name: str
    arrange: Callable[[World], list[str]]
    says: tuple[str, ...]
    code: int = 1
    traces: bool = False  # everything else is told before the slow part


def rewrite_json(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = json.loads((folder / file).read_text())
        change(data)
        (folder / file).write_text(json.dumps(data))

    return edit


def write(file: str, content: str | bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)


def remove(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def truncate(file: str, count: int = 100) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / file, (folder / file).stat().st_size - count)


def recorded(edit: Callable[[Path], Any], file: str) -> Callable[[Path], None]:
    """An edit of one file whose new size and checksum are in the manifest: they do not give it away."""

    def change(folder: Path) -> None:
        edit(folder)
        record(folder, file)

    return change


def flip_byte(file: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / file).write_bytes(content)

    return edit


def read_weights(folder: Path) -> tuple[dict[str, Any], bytearray]:
    raw = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])


def write_weights(folder: Path, header: dict[str, Any], data: bytes | bytearray) -> None:
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)


def change_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        header, data = read_weights(folder)
        change(header)
        write_weights(folder, header, data)

    return edit


def spoil_value(name: str, value: float) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        header, data = read_weights(folder)
        start = header[name]["data_offsets"][0]
        data[start : start + 4] = np.float32(value).tobytes()
        write_weights(folder, header, data)

    return edit


def add_tensor(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        header, data = read_weights(folder)
        header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
        write_weights(folder, header, data + bytes(4))

    return edit


def add_token(folder: Path) -> None:
    path = str(folder / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(path)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save(path)


def index_shard(name: str) -> Callable[[Path], None]:
    """An index of one shard that is not there."""

    def edit(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))

    return edit


# --- commands ----------------------------------------------------------------------------------------------


def exporting(edit: Callable[[Path], Any] | None = None, *options: str) -> Callable[[World], list[str]]:
    return lambda world: ["gemma3n-export", "--model", world.checkpoint(edit), "--output", "out", *options]


def exporting_from(place: Callable[[World], str]) -> Callable[[World], list[str]]:
    return lambda world: ["gemma3n-export", "--model", place(world), "--output", "out"]


def exporting_to(place: Callable[[World], str], *options: str) -> Callable[[World], list[str]]:
    return lambda world: ["gemma3n-export", "--model", world.checkpoint(), "--output", place(world), *options]


def exporting_slice(content: str | bytes, name: str = "S") -> Callable[[World], list[str]]:
    def arrange(world: World) -> list[str]:
        table = world.file("slices.csv", content)
        return [*exporting()(world), "--matformer-config", table, "--slice", name]

    return arrange


def exporting_own_slice(content: str | bytes, name: str = "S") -> Callable[[World], list[str]]:
    """The table lies in the checkpoint's folder."""
    return exporting(write("slices.csv", content), "--slice", name)


def running(edit: Callable[[Path], Any] | None = None, *options: str) -> Callable[[World], list[str]]:
    return lambda world: ["gemma3n", "run", world.artifact(edit), "Hello", "--max-new-tokens", "2", *options]


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[World], list[str]]:
    """Without the id of the export, which would give the change away."""

    def edit(data: dict[str, Any]) -> None:
        del data["export_id"]
        change(data)

    return running(rewrite_json("manifest.json", edit))


def without_template(folder: Path) -> None:
    remove("chat_template.jinja")(folder)
    rewrite_json("manifest.json", lambda data: data["files"].pop("chat_template.jinja"))(folder)


HEADER = "name,layers,ffn_hidden_dims,layers_skipped\n"


def row(widths: str, skipped: str = "[]", name: str = "S", layers: int = 3) -> str:
    return f'{name},{layers},"{widths}","{skipped}"\n'


# --- the world going wrong ---------------------------------------------------------------------------------


def full_disk_beforehand(world: World) -> list[str]:
    usage = shutil.disk_usage(world.folder)._replace(free=1000)
    world.patch.setattr(shutil, "disk_usage", lambda _path: usage)
    return exporting()(world)


def full_disk_midway(world: World) -> list[str]:
    """Over an existing artifact."""
    written = 0
    real = HashedFile.write

    def fail(self: HashedFile, data: bytes) -> None:
        nonlocal written
        written += len(data)
        if written > 500_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, data)

    world.patch.setattr(HashedFile, "write", fail)
    return exporting_to(lambda w: w.artifact(), "--force")(world)


def full_disk_at_the_end(world: World) -> list[str]:
    from gemma3n_onnx.runtime import artifact

    def fail(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    world.patch.setattr(artifact, "save_manifest", fail)
    return exporting_to(lambda _: "new/deep/out")(world)


def disk_error_midway(world: World) -> list[str]:
    def fail(_self: HashedFile, _data: bytes) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    world.patch.setattr(HashedFile, "write", fail)
    return exporting()(world)


def read_only_parent(world: World) -> list[str]:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    parent = world.folder / "locked"
    parent.mkdir(mode=0o500)
    return exporting_to(lambda _: str(parent / "out"))(world)


def unwritable_parent_for_anyone(world: World) -> list[str]:
    real = os.access
    world.patch.setattr(os, "access", lambda path, mode: mode & os.W_OK == 0 and real(path, mode))
    return exporting()(world)


def without_onnxruntime(world: World) -> list[str]:
    world.patch.setitem(sys.modules, "onnxruntime", None)
    return running()(world)


def onnxruntime_version(version: str | None) -> Callable[[World], list[str]]:
    def arrange(world: World) -> list[str]:
        module = types.ModuleType("onnxruntime")
        if version is not None:
            module.__dict__["__version__"] = version
        world.patch.setitem(sys.modules, "onnxruntime", module)
        return running()(world)

    return arrange


def broken_onnxruntime(world: World) -> list[str]:
    real = builtins.__import__

    def fail(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError("libcudnn.so.9: cannot open shared object file", name="onnxruntime")
        return real(name, *arguments, **options)

    world.patch.setattr(builtins, "__import__", fail)
    return running()(world)


def hub_offline(world: World) -> list[str]:
    import huggingface_hub
    from huggingface_hub import errors

    def fail(*_arguments: object, **_options: object) -> str:
        raise errors.LocalEntryNotFoundError("offline")

    world.patch.setattr(huggingface_hub, "snapshot_download", fail)
    return exporting_from(lambda _: "google/gemma-3n-E9B")(world)


def demo(package: Callable[[str], Path], *options: str) -> Callable[[World], list[str]]:
    """An installation whose packages lie where `package` says."""

    def arrange(world: World) -> list[str]:
        world.patch.setattr(hub, "resources", types.SimpleNamespace(files=package))
        return ["gemma3n-export", "--model", "demo", "--output", "out", *options]

    return arrange


def no_package(name: str) -> Path:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def another_artifacts_checkpoint(world: World) -> list[str]:
    other = text_checkpoint("tiny", world.folder / "other", overrides=SMALL | {"hidden_size": 128})
    return ["gemma3n", "verify", world.artifact(), "--model", str(other), "--new-tokens", "2"]


def another_slice_of_the_same_name(world: World) -> list[str]:
    rewrite_json("manifest.json", lambda m: m.update(slice="S"))(Path(artifact := world.artifact()))
    checkpoint = world.checkpoint(write("slices.csv", HEADER + row("[256, 128, 256]")))
    return ["gemma3n", "verify", artifact, "--model", checkpoint, "--new-tokens", "2"]


def e4b_of_e2b(world: World) -> list[str]:
    e2b = {"num_hidden_layers": 30, "num_kv_shared_layers": 10, "intermediate_size": 128}
    checkpoint = text_checkpoint("tiny", world.folder / "e2b", overrides=e2b)
    return ["gemma3n-export", "--model", str(checkpoint), "--slice", "E4B", "--output", "out"]


def folder_of_photos(world: World) -> str:
    (world.folder / "photos").mkdir()
    (world.folder / "photos" / "beach.jpg").write_bytes(b"jpg")
    return str(world.folder / "photos")


def empty_folder(world: World) -> str:
    (world.folder / "empty").mkdir()
    return str(world.folder / "empty")


TENSOR = "model.layers.1.self_attn.q_proj.weight"

CASES = [
    # --- checkpoints
    Case("model_missing", exporting_from(lambda _: "/no/such/folder"), ("/no/such/folder", "does not exist")),
    Case("model_is_a_file", exporting_from(lambda w: w.file("model.gguf")), ("model.gguf", "is a file")),
    Case("model_empty_folder", exporting_from(empty_folder), ("empty", "no config.json")),
    Case("model_hub_unreachable", hub_offline, ("google/gemma-3n-E9B", "cannot be reached")),
    Case("model_revision_of_folder", exporting(None, "--revision", "v2"), ("local folder", "'v2'")),
    Case(
        "demo_without_its_files",
        demo(lambda _: Path("nowhere")),
        ("demo checkpoint is not installed", "./demo"),
    ),
    Case("demo_without_its_package", demo(no_package), ("demo checkpoint is not installed", "./demo")),
    Case("demo_revision", demo(no_package, "--revision", "v2"), ("demo has no revisions", "'v2'")),
    Case("config_not_json", exporting(write("config.json", "{oops")), ("config.json", "not valid JSON")),
    Case("config_not_object", exporting(write("config.json", "[1]")), ("config.json", "not a JSON object")),
    Case(
        "config_other_model",
        exporting(rewrite_json("config.json", lambda c: c.update(model_type="llama"))),
        ("'llama'", "not a Gemma 3n"),
    ),
    Case(
        "config_key_missing", exporting(rewrite_json("config.json", lambda c: c.pop("laurel_rank"))), ("'laurel_rank'",)
    ),
    Case(
        "config_wrong_type",
        exporting(rewrite_json("config.json", lambda c: c.update(hidden_size="wide"))),
        ("hidden_size is 'wide'", "positive whole number"),
    ),
    Case(
        "config_sparsity",
        exporting(rewrite_json("config.json", lambda c: c.update(activation_sparsity_pattern=10**12))),
        ("activation_sparsity is 1000000000000", "from 0 to 0.9999"),
    ),
    Case(
        "config_layers",
        exporting(rewrite_json("config.json", lambda c: c.update(num_hidden_layers=10**9))),
        ("num_hidden_layers is 1000000000", "up to 1,024"),
    ),
    Case(
        "config_norm_is_nan",
        exporting(rewrite_json("config.json", lambda c: c.update(rms_norm_eps=math.nan))),
        ("rms_norm_eps is nan",),
    ),
    Case(
        "checkpoint_link_to_the_environment",
        exporting(lambda folder: (folder / "special_tokens_map.json").symlink_to("/proc/self/environ")),
        ("special_tokens_map.json is a link to a file elsewhere",),
    ),
    Case(
        "config_text_config_no_object",
        exporting(rewrite_json("config.json", lambda c: c.update(text_config=3))),
        ("text_config is not an object",),
    ),
    Case("weights_missing", exporting(remove(WEIGHTS)), (WEIGHTS, "only safetensors")),
    Case("weights_truncated", exporting(truncate(WEIGHTS)), (WEIGHTS, "truncated")),
    Case("weights_not_safetensors", exporting(write(WEIGHTS, b"PK\x03\x04" * 9)), (WEIGHTS, "truncated or no")),
    Case(
        "weights_shard_missing",
        exporting(index_shard("model-00001-of-00002.safetensors")),
        ("lacks model-00001-of-00002.safetensors",),
    ),
    Case(
        "weights_wrong_shape",
        exporting(rewrite_json("config.json", lambda c: c.update(intermediate_size=[256, 128, 256]))),
        ("layers.1.mlp.gate_proj.weight", "[256, 64] instead of the [128, 64]"),
    ),
    Case(
        "weights_wrong_shape_hidden_by_a_cut",
        lambda w: [
            *exporting(rewrite_json("config.json", lambda c: c.update(intermediate_size=[320, 256, 256])))(w),
            *("--slice", "S", "--matformer-config", w.file("s.csv", HEADER + row("[288, 256, 256]"))),
        ],
        ("layers.0.mlp.gate_proj.weight", "[256, 64] instead of the [320, 64]"),
    ),
    Case(
        "weights_tensor_missing",
        exporting(change_header(lambda h: h.update(unrelated=h.pop(TENSOR)))),
        (f"no tensor {TENSOR}",),
    ),
    Case(
        "weights_stray_tensor",
        exporting(add_tensor("model.layers.0.mystery.weight")),
        ("layers.0.mystery.weight", "does not have"),
    ),
    Case("weights_nan", exporting(spoil_value(TENSOR, math.nan)), ("layers.1.self_attn.q_proj", "NaN"), traces=True),
    Case(
        "weights_beyond_fp16",
        exporting(spoil_value(TENSOR, 1e6), "--precision", "fp16"),
        ("layers.1.self_attn.q_proj", "does not fit into fp16"),
        traces=True,
    ),
    Case(
        "weights_head_missing",
        exporting(rewrite_json("config.json", lambda c: c.update(tie_word_embeddings=False))),
        ("no lm_head.weight", "tie_word_embeddings to false"),
    ),
    Case(
        "weights_head_missing_and_tied_to_null",
        exporting(rewrite_json("config.json", lambda c: c.update(tie_word_embeddings=None))),
        ("no lm_head.weight", "tie_word_embeddings to null"),
    ),
    Case(
        "weights_unsupported_dtype",
        exporting(change_header(lambda h: h[TENSOR].update(dtype="I32"))),
        (TENSOR, "dtype I32"),
    ),
    Case("tokenizer_missing", exporting(remove("tokenizer.json")), ("no tokenizer.json",)),
    Case("tokenizer_of_another_vocabulary", exporting(add_token), ("ids up to 1,280", "resize_token_embeddings")),
    Case(
        "weights_fewer_rows_than_the_config",
        exporting(rewrite_json("config.json", lambda c: c.update(vocab_size_per_layer_input=1100))),
        ("embed_tokens_per_layer.weight", "[1024, 48] instead of the [1100, 48]", "config.json that was saved with it"),
    ),
    Case("tokenizer_corrupt", exporting(write("tokenizer.json", "{}")), ("tokenizer.json", "not a tokenizer")),
    Case(
        "generation_config_not_json",
        exporting(write("generation_config.json", "{,}")),
        ("generation_config.json", "not valid JSON"),
    ),
    Case(
        "generation_config_wrong_ids",
        exporting(write("generation_config.json", '{"eos_token_id": [1, "stop"]}')),
        ("eos_token_id", "'stop'"),
    ),
    Case(
        "generation_config_sampling",
        exporting(write("generation_config.json", '{"eos_token_id": 1, "do_sample": true, "top_p": 1.5}')),
        ("checkpoint/generation_config.json", "top_p must be a number above 0 and up to 1, not 1.5"),
    ),
    Case(
        "artifact_generation_config",
        running(recorded(write("generation_config.json", '{"top_k": -1}'), "generation_config.json")),
        ("artifact/generation_config.json", "top_k must be a whole number of at least 1, not -1"),
    ),
    Case(
        "chat_template_not_text",
        exporting(write("chat_template.jinja", b"\xff\xfe\x00")),
        ("chat_template.jinja", "not UTF-8"),
    ),
    Case(
        "chat_template_corrupt",
        exporting(write("chat_template.jinja", "{% for %}")),
        ("The chat template of", "not valid Jinja"),
    ),
    Case(
        "chat_template_endless",
        exporting(write("chat_template.jinja", 2 * "{% for _ in range(99999) %}" + 2 * "{% endfor %}")),
        ("The chat template of", "takes more than 1,000,000 steps"),
    ),
    Case(
        "chat_template_option_huge",
        lambda w: [*exporting()(w), "--chat-template", w.file("my.jinja", "{{ 'x' * 10**10 }}")],
        ("my.jinja cannot be used", "more than 67,108,864 characters", "give another"),
    ),
    Case(
        "chat_template_option_missing_before_the_model_is_opened",
        lambda w: [*exporting_from(lambda _: "/no/such/folder")(w), "--chat-template", "no.jinja"],
        ("no.jinja", "No such file", "Jinja file"),
    ),
    Case(
        "chat_template_option_corrupt",
        lambda w: [*exporting()(w), "--chat-template", w.file("my.jinja", "{{ messages")],
        ("my.jinja is not valid Jinja", "give another"),
    ),
    Case(
        "chat_template_option_not_text",
        lambda w: [*exporting()(w), "--chat-template", w.file("my.jinja", b"\xff\xfe")],
        ("my.jinja is not UTF-8",),
    ),
    # --- slice tables
    Case("csv_missing", lambda w: [*exporting()(w), *("--matformer-config", "no.csv", "--slice", "S")], ("no.csv",)),
    Case("csv_without_slice", lambda w: [*exporting()(w), *("--matformer-config", "no.csv")], ("needs --slice",)),
    Case("csv_binary", exporting_slice(b"\x89PNG\r\n\xff\x00"), ("slices.csv", "not a CSV")),
    Case("csv_empty", exporting_slice(""), ("slices.csv", "no slices")),
    Case(
        "csv_column_missing", exporting_slice("name,layers,layers_skipped\nS,3,[]\n"), ("line 1", "'FFN Hidden Dims'")
    ),
    Case(
        "csv_code",
        exporting_slice(HEADER + row("[__import__('os').system('touch pwned')]", layers=1)),
        ("line 2", "__import__", "neither an integer nor a product"),
    ),
    Case("csv_product_of_a_list", exporting_slice(HEADER + row("[256]*3")), ("line 2", "a bracket of '[256]*3'")),
    Case(
        "csv_same_name_twice",
        exporting_slice(HEADER + 2 * row("[256, 256, 256]")),
        ("line 3", "'S' is already the slice of line 2"),
    ),
    Case(
        "csv_wrong_length",
        exporting_slice(HEADER + row("[256, 256]")),
        ("line 2", "3 layers, but 'ffn_hidden_dims' has 2 widths"),
    ),
    Case(
        "csv_too_few_for_checkpoint",
        exporting_slice(HEADER + row("[256, 256]", layers=2)),
        ("Slice S", "2 layers", "this one has 3"),
    ),
    Case("csv_width_above", exporting_slice(HEADER + row("[256, 512, 256]")), ("layer 1", "512 is above")),
    Case("csv_width_zero", exporting_slice(HEADER + row("[256, 0, 256]")), ("layer 1 has width 0",)),
    Case(
        "csv_width_not_multiple", exporting_slice(HEADER + row("[256, 40, 256]")), ("layer 1", "40 is not a multiple")
    ),
    Case("csv_skips_donor", exporting_slice(HEADER + row("[256, 256]", "[0]", layers=2)), ("skips layer 0", "donor")),
    Case("csv_skip_out_of_range", exporting_slice(HEADER + row("[256, 256]", "[9]", layers=2)), ("skips layer 9",)),
    Case(
        "csv_slice_unknown_before_the_model_is_opened",
        lambda w: [
            *exporting_from(lambda _: "/no/such/folder")(w),
            *("--slice", "SS", "--matformer-config", w.file("my.csv", HEADER + row("[256, 256, 256]"))),
        ],
        ("no slice 'SS' in", "my.csv", "nearest are S."),
    ),
    Case(
        "csv_binary_before_the_model_is_opened",
        lambda w: ["gemma3n", "slices", "--model", "/no/such/folder", "--matformer-config", w.file("my.csv", b"\0")],
        ("my.csv", "not a CSV"),
    ),
    Case("own_csv_binary", exporting_own_slice(b"\x89PNG\r\n\xff\x00"), ("checkpoint/slices.csv", "not a CSV")),
    Case("own_csv_empty", exporting_own_slice(""), ("checkpoint/slices.csv", "no slices")),
    Case(
        "own_csv_is_a_folder",
        exporting(lambda folder: (folder / "slices.csv").mkdir(), "--slice", "S"),
        ("checkpoint/slices.csv", "cannot be read as a CSV"),
    ),
    Case(
        "own_csv_wrong_length",
        exporting_own_slice(HEADER + row("[256, 256]")),
        ("checkpoint/slices.csv, line 2", "3 layers, but 'ffn_hidden_dims' has 2 widths"),
    ),
    Case("own_csv_width_above", exporting_own_slice(HEADER + row("[256, 512, 256]")), ("layer 1", "512 is above")),
    Case(
        "slice_not_in_own_csv",
        exporting_own_slice(HEADER + row("[256, 128, 256]", name="E2B-half"), "E2.98B-layer"),
        ("no slice 'E2.98B-layer' in", "checkpoint/slices.csv", "E2B-half"),
    ),
    Case(
        "slices_none_of_own_csv_fits",
        lambda w: [
            *("gemma3n", "slices", "--model"),
            w.checkpoint(write("slices.csv", HEADER + row("[256, 512, 256]"))),
        ],
        ("No slice of", "checkpoint/slices.csv"),
    ),
    Case("verify_another_slice_of_the_same_name", another_slice_of_the_same_name, ("slice 'S'", "text parameters")),
    Case("slice_unknown", exporting(None, "--slice", "E3B"), ("'E3B' in the published table",)),
    Case("slice_ambiguous", exporting(None, "--slice", "E2.98B"), ("'E2.98B' is ambiguous", "E2.98B-layer")),
    Case("slice_e4b_of_e2b", e4b_of_e2b, ("Slice E4B", "35 layers", "this one has 30")),
    Case(
        "slices_none_fits",
        lambda w: ["gemma3n", "slices", "--model", w.checkpoint()],
        ("No slice", "checkpoint"),
    ),
    # --- export options and the output
    Case(
        "precision_for_target",
        exporting(None, "--target", "cuda", "--precision", "fp32"),
        ("fp32", "cuda", "fp16, bf16"),
    ),
    Case("precision_unknown", exporting(None, "--precision", "int3"), ("'int3'", "fp32, fp16, bf16")),
    Case("target_unknown", exporting(None, "--target", "tpu"), ("'tpu'", "cpu or cuda")),
    Case("logits_unknown", exporting(None, "--logits", "some"), ("'some'",), code=2),
    Case("modality_unknown", exporting(None, "--modalities", "text,smell"), ("'smell'", "text, vision, audio")),
    Case("modality_lacking", exporting(None, "--modalities", "vision"), ("no vision", "holds text")),
    Case("weights_foreign_tensor", exporting(add_tensor("projector.weight")), ("projector.weight", "no Gemma 3n has")),
    Case(
        "verify_modality_lacking",
        lambda w: ["gemma3n", "verify", w.artifact(), "--model", w.checkpoint(), "--modalities", "audio"],
        ("no audio to compare", "modalities are text"),
    ),
    Case("run_image_missing", running(None, "--image", "no.jpg"), ("an image", "no vision encoder", "--modalities")),
    Case("run_image_raw", running(None, "--raw", "--image", "no.jpg"), ("an image", "no vision encoder")),
    Case("run_video_raw", running(None, "--raw", "--video", "no.mp4"), ("--video need the chat template",), code=2),
    Case("run_image_size_bad", running(None, "--image-size", "0"), ("--image-size must be a whole number",)),
    Case("run_long_audio_bad", running(None, "--long-audio", "cut"), ("'cut'", "error or split")),
    Case("option_unknown", exporting(None, "--turbo"), ("--turbo",), code=2),
    Case("model_not_given", lambda _: ["gemma3n-export"], ("--model",), code=2),
    Case("output_exists", exporting_to(lambda w: w.artifact()), ("artifact", "exists already", "--force")),
    Case("output_is_no_artifact", exporting_to(folder_of_photos, "--force"), ("photos", "is no artifact")),
    Case("output_is_current_folder", exporting_to(lambda _: ".", "--force"), ("is no artifact",)),
    Case("output_is_a_file", exporting_to(lambda w: w.file("out.onnx"), "--force"), ("out.onnx", "is a file")),
    Case("output_under_a_file", exporting_to(lambda w: w.file("note") + "/out"), ("note", "is a file")),
    Case("output_name_too_long", exporting_to(lambda _: "x" * 300), ("xxx", "File name too long")),
    Case("output_without_permission", read_only_parent, ("no permission", "locked")),
    Case("output_unwritable", unwritable_parent_for_anyone, ("no permission",)),
    Case("disk_full_beforehand", full_disk_beforehand, ("GB are needed", "GB free")),
    Case("disk_full_midway", full_disk_midway, ("is full",), traces=True),
    Case("disk_full_at_the_end", full_disk_at_the_end, ("is full",), traces=True),
    Case("disk_error_midway", disk_error_midway, ("Input/output error", "out"), traces=True),
    Case(
        "make_checkpoint_over_other_files",
        lambda w: ["gemma3n", "make-checkpoint", "--size", "tiny", "--force", "--output", folder_of_photos(w)],
        ("photos", "is no checkpoint"),
    ),
    Case(
        "make_checkpoint_seed",
        lambda _: ["gemma3n", "make-checkpoint", "--size", "tiny", "--output", "out", "--seed", "-1"],
        ("--seed", "-1"),
        code=2,
    ),
    # --- artifacts
    Case("artifact_missing", lambda _: ["gemma3n", "run", "nowhere", "Hello"], ("nowhere", "export one")),
    Case("artifact_is_a_checkpoint", lambda w: ["gemma3n", "inspect", w.checkpoint()], ("no manifest.json",)),
    Case(
        "run_a_checkpoint",
        lambda w: ["gemma3n", "run", w.checkpoint(), "Hello"],
        ("is a checkpoint", "gemma3n-export --model"),
    ),
    Case("manifest_not_json", running(write("manifest.json", "{")), ("manifest.json", "not valid JSON")),
    Case("manifest_other_format", manifest(lambda m: m.update(format="gguf")), ("does not describe",)),
    Case("manifest_other_version", manifest(lambda m: m.update(format_version="9.0")), ("version 9.0",)),
    Case(
        "manifest_edited",
        running(rewrite_json("manifest.json", lambda m: m["token_embeddings"].update(scale=9.0))),
        ("manifest.json was changed after the export",),
    ),
    Case("manifest_key_missing", manifest(lambda m: m.pop("max_context")), ("'max_context'",)),
    Case("manifest_wrong_type", manifest(lambda m: m.update(vocab_size="many")), ("vocab_size is 'many'", "int")),
    Case(
        "manifest_path_above",
        manifest(lambda m: m["files"].update({"../secret": m["files"]["config.json"]})),
        ("'../secret'", "not in its folder"),
    ),
    Case(
        "manifest_path_absolute",
        manifest(lambda m: m["files"].update({"/etc/passwd": m["files"]["config.json"]})),
        ("'/etc/passwd'", "not in its folder"),
    ),
    Case(
        "manifest_graph_elsewhere",
        manifest(lambda m: m["decoder"].update(file="../decoder.onnx")),
        ("'../decoder.onnx' is not among the files",),
    ),
    Case(
        "manifest_table_too_large",
        manifest(lambda m: m["per_layer_embeddings"].update(rows=9999)),
        ("per_layer_embeddings.bin", "9999 x 48"),
    ),
    Case("manifest_table_scale", manifest(lambda m: m["token_embeddings"].update(scale=-8.0)), ("scale is -8.0",)),
    Case("manifest_nan", manifest(lambda m: m["token_embeddings"].update(scale=math.nan)), ("scale is nan",)),
    Case("manifest_vocabulary", manifest(lambda m: m.update(vocab_size=10**12)), ("vocab_size is 1000000000000",)),
    Case("manifest_no_list", manifest(lambda m: m.update(caches="x" * 10**6)), ("caches is 'xxx", "must be a list")),
    Case(
        "manifest_output_removed",
        manifest(lambda m: m["decoder"]["outputs"].pop()),
        ("decoder.onnx has the output 'present.1.value' in fp32 where the manifest has none",),
    ),
    Case("manifest_scorer_outputs_removed", manifest(lambda m: m["scorer"].update(outputs=[])), ("no top_ids",)),
    Case(
        "manifest_name_too_long",
        manifest(lambda m: m["files"].update({"x" * 300: m["files"]["config.json"]})),
        ("names the file 'xxx", "not in its folder"),
    ),
    Case("artifact_name_too_long", lambda _: ["gemma3n", "run", "x" * 300, "Hello"], ("no artifact folder xxx",)),
    Case("model_name_too_long", exporting_from(lambda _: "x" * 300), ("xxx", "does not exist")),
    Case("shard_name_too_long", exporting(index_shard("x" * 300)), ("lacks xxx",)),
    Case("artifact_template_empty", running(write("chat_template.jinja", "")), ("chat_template.jinja has 0 bytes",)),
    Case(
        "artifact_template_blank",
        running(recorded(write("chat_template.jinja", "\n"), "chat_template.jinja")),
        ("chat_template.jinja is empty",),
    ),
    Case(
        "artifact_template_changed",
        running(flip_byte("chat_template.jinja")),
        ("chat_template.jinja is damaged", "--chat-template FILE"),
    ),
    Case("artifact_config_changed", running(flip_byte("config.json")), ("config.json is damaged", "SHA-256")),
    Case("artifact_graph_changed", running(flip_byte("scorer.onnx")), ("scorer.onnx is damaged", "SHA-256")),
    Case(
        "manifest_table_dtype",
        manifest(lambda m: m["token_embeddings"].update(dtype="int3")),
        ("token_embeddings.bin", "'int3'"),
    ),
    Case("manifest_eos_beyond", manifest(lambda m: m.update(eos_token_ids=[1, 99999])), ("99999", "vocabulary")),
    Case(
        "manifest_cache_not_in_graph",
        manifest(lambda m: m["caches"][0].update(past_key="past.zero")),
        ("decoder.onnx has no input 'past.zero'",),
    ),
    Case(
        "manifest_cache_left_out",
        manifest(lambda m: m["caches"].pop()),
        ("decoder.onnx has the input 'past_key_values.1.key'",),
    ),
    Case(
        "manifest_cache_of_other_size",
        manifest(lambda m: m["caches"][0].update(head_dim=32)),
        ("'past_key_values.0.key' of width 16 instead of 32",),
    ),
    Case("artifact_file_missing", running(remove("decoder.onnx.data")), ("lacks the file decoder.onnx.data",)),
    Case("artifact_truncated", running(truncate("token_embeddings.bin")), ("token_embeddings.bin", "bytes")),
    Case(
        "artifact_flipped_byte",
        lambda w: ["gemma3n", "inspect", "--verify", w.artifact(flip_byte("decoder.onnx.data"))],
        ("decoder.onnx.data is damaged", "SHA-256"),
    ),
    Case(
        "artifact_graph_corrupt",
        running(recorded(write("decoder.onnx", b"\x08\x0anonsense"), "decoder.onnx")),
        ("decoder.onnx", "cannot load"),
    ),
    Case(
        "artifact_tokenizer_corrupt",
        running(recorded(write("tokenizer.json", "{"), "tokenizer.json")),
        ("tokenizer.json", "not a tokenizer"),
    ),
    Case(
        "artifact_template_corrupt",
        running(recorded(write("chat_template.jinja", "{% for %}"), "chat_template.jinja")),
        ("chat_template.jinja", "not valid Jinja"),
    ),
    Case(
        "artifact_template_not_text",
        running(recorded(write("chat_template.jinja", b"\xff\xfe"), "chat_template.jinja")),
        ("chat_template.jinja", "not UTF-8"),
    ),
    Case(
        "run_template_corrupt",
        lambda w: [*running()(w), "--chat-template", w.file("my.jinja", "{% if %}")],
        ("my.jinja is not valid Jinja",),
    ),
    Case(
        "serve_template_corrupt",
        lambda w: ["gemma3n", "serve", w.artifact(), "--chat-template", w.file("my.jinja", "{% if %}")],
        ("my.jinja is not valid Jinja",),
    ),
    Case(
        "run_system_without_template",
        running(without_template, "--system", "Be brief."),
        ("no chat template", "--chat-template FILE", "gemma3n-export"),
    ),
    Case(
        "chat_without_template",
        lambda w: ["gemma3n", "chat", w.artifact(without_template)],
        ("no chat template", "cannot chat", "--chat-template FILE"),
    ),
    # --- prompts, options, providers
    Case("prompt_empty", lambda w: ["gemma3n", "run", w.artifact(), ""], ("prompt is empty",)),
    Case("prompt_beyond_context", running(None, "--raw", "--max-new-tokens", "256"), ("context of 256",)),
    Case("prompt_lone_surrogate", lambda w: ["gemma3n", "run", w.artifact(), "a\udcff"], ("lone surrogate",)),
    Case("system_with_raw", running(None, "--raw", "--system", "Be brief."), ("--system",), code=2),
    Case("max_new_tokens", running(None, "--max-new-tokens", "0"), ("--max-new-tokens", "0")),
    Case("temperature", running(None, "--temperature", "-1"), ("--temperature", "-1")),
    Case("temperature_nan", running(None, "--temperature", "nan"), ("--temperature", "nan")),
    Case("temperature_text", running(None, "--temperature", "hot"), ("--temperature", "'hot'"), code=2),
    Case("top_k", running(None, "--top-k", "0"), ("--top-k", "0")),
    Case("top_p", running(None, "--top-p", "1.5"), ("--top-p", "1.5")),
    Case("min_p", running(None, "--min-p", "2"), ("--min-p", "2")),
    Case("repetition_penalty", running(None, "--repetition-penalty", "0"), ("--repetition-penalty", "0")),
    Case("presence_penalty", running(None, "--presence-penalty", "3"), ("--presence-penalty", "3")),
    Case("frequency_penalty", running(None, "--frequency-penalty", "-9"), ("--frequency-penalty", "-9")),
    Case("stop_empty", running(None, "--stop", ""), ("--stop must be",)),
    Case("seed", running(None, "--seed", "-1"), ("--seed", "-1")),
    Case("threads", running(None, "--threads", "0"), ("--threads must be a whole number of at least 1, not 0",)),
    Case("provider_unknown", running(None, "--provider", "abacus"), ("'abacus'", choices())),
    Case("command_unknown", lambda _: ["gemma3n", "rnu"], ("'rnu'",), code=2),
    Case("no_onnxruntime", without_onnxruntime, ("No onnxruntime is installed", "gemma3n-onnx[cpu]")),
    Case("old_onnxruntime", onnxruntime_version("1.20.1"), ("1.20.1 is too old", "1.31")),
    Case("leftover_onnxruntime", onnxruntime_version(None), ("unknown version", "1.31")),
    Case("broken_onnxruntime", broken_onnxruntime, ("cannot be loaded", "libcudnn.so.9")),
    Case("verify_other_checkpoint", another_artifacts_checkpoint, ("--model", "3, 128 and 1280")),
    Case(
        "verify_beyond_context",
        lambda w: [
            *("gemma3n", "verify", w.artifact(), "--model", w.checkpoint()),
            *("--prompt-tokens", "200", "--new-tokens", "100"),
        ],
        ("context of 256",),
    ),
]


@pytest.fixture
def world(tmp_path: Path, small_checkpoint: Path, small_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(tmp_path)
    return World(tmp_path, small_checkpoint, small_artifact, monkeypatch)


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder, hidden ones too, with a digest."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_input_is_one_sentence_and_changes_nothing(case: Case, world: World) -> None:
    command = case.arrange(world)
    if not case.traces:
        world.patch.setattr(trace, "trace_decoder", lambda *_: pytest.fail("traced before the input was checked"))
    before = contents(world.folder)
    outcome = run_command(world.patch, command)
    assert outcome.code == case.code, outcome
    assert "Traceback" not in outcome.err + outcome.out
    errors = [line for line in outcome.err.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1, outcome.err
    if case.code == 1:
        steps = [line for line in outcome.err.splitlines() if case.traces and line.startswith(STEPS)]
        assert outcome.err.splitlines() == [*steps, *errors]
        assert errors[0].endswith("."), errors[0]
    for part in case.says:
        assert part in errors[0], errors[0]
    assert contents(world.folder) == before


def test_cuda_where_there_is_none(world: World) -> None:
    import onnxruntime

    world.patch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    outcome = run_command(world.patch, running(None, "--provider", "cuda")(world))
    assert outcome.code == 1
    assert "no CUDAExecutionProvider" in outcome.err and "gemma3n-onnx[cuda]" in outcome.err


@pytest.mark.parametrize("package", ["torch", "onnx_ir"])
def test_an_exporter_without_a_package_says_how_to_install_it(
    small_checkpoint: Path, tmp_path: Path, package: str
) -> None:
    code = f"import sys; sys.modules['{package}'] = None; from gemma3n_onnx.export.cli.main import main; main()"
    arguments = ["--model", str(small_checkpoint), "--output", "out"]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"needs {package}" in done.stderr and "gemma3n-onnx[export]" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- what only Python callers can do -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(small_artifact: Path) -> OnnxGemma3n:
    return OnnxGemma3n.from_pretrained(small_artifact)


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("prompt", "options", "kind", "says"),
    [
        ("", {}, PromptError, "empty"),
        ([], {}, PromptError, "empty"),
        (None, {}, PromptError, "NoneType"),
        ([1, 5000], {}, PromptError, "5000"),
        ([1, -1], {}, PromptError, "-1"),
        ([1, True], {}, PromptError, "True"),
        ([1, 2.5], {}, PromptError, "2.5"),
        (["Hello", 7], {}, PromptError, "int"),
        (["Hello", ""], {}, PromptError, "empty"),
        ([{"role": "judge", "content": "Hi"}], {}, PromptError, "'judge'"),
        ([{"content": "Hi"}], {}, PromptError, "None"),
        ([{"role": "system", "content": "Hi"}], {}, PromptError, "user"),
        (user(3), {}, PromptError, "3"),
        (user([{"type": "hologram"}]), {}, PromptError, "'hologram'"),
        (user([{"type": "text"}]), {}, PromptError, "string"),
        (user(["Hi"]), {}, PromptError, "mapping"),
        ("Hello " * 200, {}, ContextLengthError, "context of 256"),
        ([2] * 256, {"max_new_tokens": 1}, ContextLengthError, "256"),
        ("Hello", {"turbo": True}, OptionError, "'turbo'"),
        ("Hello", {"max_new_tokens": 1.5}, OptionError, "max_new_tokens"),
        ("Hello", {"temperature": "warm"}, OptionError, "'warm'"),
        ("Hello", {"logprobs": 21}, OptionError, "logprobs"),
        ("Hello", {"stop": ["a", ""]}, OptionError, "stop"),
        ("Hello", {"seed": 2**64}, OptionError, "seed"),
    ],
)
def test_a_bad_prompt_or_option_is_told_before_any_work(
    model: OnnxGemma3n, prompt: Any, options: dict[str, Any], kind: type[Gemma3nError], says: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.engine, "prefill", lambda *_: pytest.fail("worked before checking"))
        with pytest.raises(kind) as caught:
            model.generate(prompt, **options)
    message = str(caught.value)
    assert says in message
    assert message.endswith(".") and "\n" not in message


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 0},
        {"threads": "four"},
        {"prefill_chunk": 0},
        {"prefill_chunk": "all"},
        {"provider": "x"},
        {"memory_budget": -1},
    ],
)
def test_bad_load_options(small_artifact: Path, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=str(next(iter(options.values())))):
        OnnxGemma3n.from_pretrained(small_artifact, **options)


def test_errors_are_also_what_python_expects(tmp_path: Path, model: OnnxGemma3n) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        OnnxGemma3n.from_pretrained(tmp_path / "nowhere")
    assert isinstance(missing.value, ArtifactNotFoundError)
    with pytest.raises(ValueError, match="empty"):
        model.generate("")


def test_a_failing_graph_is_a_typed_error(model: OnnxGemma3n) -> None:
    class Failing:
        def run_with_iobinding(self, *_arguments: object) -> None:
            raise RuntimeError("[ONNXRuntimeError] : 6 : bad allocation\nsecond line")

    session = model.engine._session
    with pytest.MonkeyPatch.context() as patch:
        binding = session.bind()
        patch.setattr(session, "_session", Failing())
        with pytest.raises(Gemma3nError, match="bad allocation") as caught:
            binding.run()
    assert "\n" not in str(caught.value)


def test_a_cache_that_does_not_fit_is_a_typed_error(model: OnnxGemma3n) -> None:
    with pytest.raises(Gemma3nError, match="cannot allocate"):
        model.engine.new_cache(1, 10**13)
