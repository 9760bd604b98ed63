import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file

from gemma3n_onnx.export.checkpoint.checkpoint import INDEX, WEIGHTS, Checkpoint
from gemma3n_onnx.export.checkpoint.processor import log_mel_settings
from gemma3n_onnx.export.checkpoint.safetensors_file import SafetensorsFile, TensorSpec
from gemma3n_onnx.export.errors import CheckpointError, CheckpointNotFoundError
from support import text_checkpoint

SMALL = {"num_hidden_layers": 7, "num_kv_shared_layers": 2}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A checkpoint of seven layers that a test may damage."""
    return text_checkpoint("tiny", tmp_path / "small", overrides=SMALL)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sharded") / "checkpoint"
    return text_checkpoint("tiny", output, dtype="bfloat16", overrides=SMALL, shard_bytes=200_000)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("folder", ["tiny_checkpoint", "sharded"])
def test_every_tensor_has_the_bytes_that_safetensors_reads(folder: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(folder)
    checkpoint = Checkpoint.open(path)
    expected = load_all(path)
    assert checkpoint.names == tuple(sorted(expected))
    assert checkpoint.naming.text == "model."
    for name in checkpoint.text_names():
        tensor = expected["model." + name]
        array = checkpoint.read(name)
        assert array.shape == tuple(tensor.shape) == checkpoint.spec(name).shape
        assert array.tobytes() == bytes_of(tensor)


def test_row_ranges_are_rows_of_the_tensor(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    whole = checkpoint.read("embed_tokens.weight")
    assert whole.dtype == ml_dtypes.bfloat16
    assert checkpoint.spec("embed_tokens.weight") == TensorSpec("BF16", (1280, 64))
    for start, stop in [(0, 1), (17, 300), (1279, 1280), (5, 5), (0, 1280)]:
        np.testing.assert_array_equal(checkpoint.read_rows("embed_tokens.weight", start, stop), whole[start:stop])
        np.testing.assert_array_equal(checkpoint.raw_read_rows(EMBEDDING, start, stop), whole[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3), (0, 1281)])
def test_rows_outside_the_tensor_are_refused(tiny_checkpoint: Path, start: int, stop: int) -> None:
    with pytest.raises(IndexError, match="not within"):
        Checkpoint.open(tiny_checkpoint).read_rows("embed_tokens.weight", start, stop)


def test_arrays_cannot_change_the_checkpoint(tiny_checkpoint: Path) -> None:
    assert not Checkpoint.open(tiny_checkpoint).read("norm.weight").flags.writeable


def test_both_config_spellings_give_one_architecture(small: Path) -> None:
    expected = Checkpoint.open(small).text_config
    config = json.loads((small / "config.json").read_text())
    del config["rope_parameters"]
    config["torch_dtype"] = config.pop("dtype")
    config |= {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "rope_scaling": None}
    (small / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(small).text_config == expected


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_full_checkpoints_give_the_same_text_tensors(small: Path, prefix: str) -> None:
    plain = Checkpoint.open(small)
    tensors = {prefix + k.removeprefix("model."): v for k, v in load_all(small).items()}
    config = plain.config
    rewrite(small, tensors | {"model.vision_tower.scale": torch.ones(2, 3), "model.steps": torch.tensor([7])})
    (small / "config.json").write_text(json.dumps({"model_type": "gemma3n", "text_config": config}))
    full = Checkpoint.open(small)
    assert full.naming.text == prefix
    assert full.text_names() == plain.text_names()
    assert full.text_config == plain.text_config
    assert full.read("norm.weight").tobytes() == bytes_of(tensors[prefix + "norm.weight"])
    np.testing.assert_array_equal(full.raw_read("model.vision_tower.scale"), np.ones((2, 3), np.float32))
    with pytest.raises(CheckpointError, match=r"model\.steps .* I64"):
        full.raw_read("model.steps")


@pytest.mark.parametrize("told", [True, False])
def test_a_head_that_equals_the_embedding_is_tied_whatever_the_config_says(small: Path, told: bool) -> None:
    tensors = load_all(small)
    rewrite(small, tensors | {HEAD: tensors[EMBEDDING].clone()})
    edit_json(small / "config.json", tie_word_embeddings=told)
    checkpoint = Checkpoint.open(small)
    assert checkpoint.text_config.tied_head
    assert HEAD in checkpoint.names and HEAD not in checkpoint.text_names()
    checkpoint.check_all_known()


@pytest.mark.parametrize("told", [True, False])
def test_a_head_that_differs_in_one_value_is_a_weight_of_its_own(small: Path, told: bool) -> None:
    tensors = load_all(small)
    head = tensors[EMBEDDING].clone()
    head[-1, -1] += 1
    rewrite(small, tensors | {HEAD: head})
    edit_json(small / "config.json", tie_word_embeddings=told)
    checkpoint = Checkpoint.open(small)
    assert not checkpoint.text_config.tied_head
    assert HEAD in checkpoint.text_names()
    np.testing.assert_array_equal(checkpoint.read(HEAD), head)
    checkpoint.check_all_known()


NORM = "base_model.model.model.norm"


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([f"{NORM}.lora_A.default.weight"], "lora_A.* not merged; merge it .*merge_and_unload"),
        ([f"{NORM}.base_layer.weight"], "base_layer.* not merged"),
        (["model.embed_tokens.lora_embedding_A.default"], "lora_embedding_A.* not merged"),
        ([f"{NORM}.modules_to_save.default.weight"], "both .*norm.*; remove the unused one"),
        (
            ["model.x.modules_to_save.one.weight", "model.x.modules_to_save.two.weight"],
            r"both model\.x\.modules_to_save\.one\.weight and model\.x\.modules_to_save\.two",
        ),
        (["model.x.original_module.weight"], r"model\.x\.original_module\.weight, but not the trained copy"),
    ],
)
def test_ambiguous_names_of_peft_are_refused(small: Path, names: list[str], reason: str) -> None:
    rewrite(small, load_all(small) | {name: torch.ones(2) for name in names})
    with pytest.raises(CheckpointError, match=reason):
        Checkpoint.open(small)


@pytest.mark.parametrize("kept", [(), ("config.json",)])
def test_an_adapter_is_told_from_a_checkpoint(small: Path, kept: tuple[str, ...]) -> None:
    for path in small.iterdir():
        if path.name not in kept:
            path.unlink()
    (small / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "google/gemma-3n-E2B-it"}))
    (small / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointNotFoundError, match=r"adapter for google/gemma-3n-E2B-it.*merge_and_unload"):
        Checkpoint.open(small)


def test_an_unknown_tensor_is_named(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.99\.x"):
        Checkpoint.open(tiny_checkpoint).read("layers.99.x")


@pytest.mark.parametrize("model", ["/no/such/folder", "no-such-folder", "a/b/c", "https://example.com/model"])
def test_a_path_that_does_not_exist_is_not_looked_up(model: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        Checkpoint.open(model)


def test_a_file_is_no_folder(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="is a file"):
        Checkpoint.open(tiny_checkpoint / WEIGHTS)


def test_a_local_folder_has_no_revision(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="leave revision 'main' out"):
        Checkpoint.open(tiny_checkpoint, revision="main")


@pytest.mark.parametrize(("missing", "message"), [("config.json", "no config.json"), (WEIGHTS, "only safetensors")])
def test_a_folder_without_config_or_weights_is_refused(small: Path, missing: str, message: str) -> None:
    (small / missing).unlink()
    with pytest.raises(CheckpointNotFoundError, match=message):
        Checkpoint.open(small)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_invalid_json_is_refused(small: Path, text: str) -> None:
    (small / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json .*download it again"):
        Checkpoint.open(small)


def test_another_model_is_refused(small: Path) -> None:
    edit_json(small / "config.json", model_type="gemma3_text")
    with pytest.raises(CheckpointError, match="not a Gemma 3n config"):
        Checkpoint.open(small)


def test_weights_without_a_text_decoder_are_refused(small: Path) -> None:
    rewrite(small, {"encoder.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match="no Gemma 3n text decoder"):
        Checkpoint.open(small)


def test_an_unsupported_dtype_is_named(small: Path) -> None:
    tensors = load_all(small)
    rewrite(small, tensors | {"model.norm.weight": tensors["model.norm.weight"].double()})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight .* F64"):
        Checkpoint.open(small)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(small: Path, kept: int) -> None:
    path = small / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint.open(small)


def test_trailing_bytes_are_refused(small: Path) -> None:
    with (small / WEIGHTS).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match="damaged"):
        Checkpoint.open(small)


def tensor(shape: str, start: int, stop: int, dtype: str = "F32") -> str:
    return f'{{"dtype": "{dtype}", "shape": {shape}, "data_offsets": [{start}, {stop}]}}'


def weights(header: str, data_bytes: int) -> bytes:
    return len(header.encode()).to_bytes(8, "little") + header.encode() + bytes(data_bytes)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("not json", "Expecting value"),
        ("[" * 100_000, "recursion"),
        ("[1, 2]", "not an object"),
        ('{"a": 3}', "'a' is not described by"),
        ('{"a": {"shape": [1], "data_offsets": [0, 4]}}', "'a' is not described by"),
        (f'{{"a": {tensor("[2]", 0, 4)}}}', r"F32 of shape \[2\], does not fill the bytes \[0, 4\]"),
        (f'{{"a": {tensor("[1]", 0, 4, "F99")}}}', "'a' has the unknown dtype 'F99'"),
        (f'{{"a": {tensor("[1.0]", 0, 4)}}}', r"'a' has the shape \[1.0\], not a list of whole numbers"),
        (f'{{"a": {tensor("[-1, -1]", 0, 4)}}}', r"'a' has the shape \[-1, -1\]"),
        (f'{{"a": {tensor("[true]", 0, 4)}}}', r"'a' has the shape \[True\]"),
        (f'{{"a": {tensor("[1]", 4, 0)}}}', "does not fill"),
        (f'{{"a": {tensor("[1]", 0, 4)}, "a": {tensor("[1]", 0, 4)}}}', "'a' comes twice"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, header: str, reason: str) -> None:
    (tmp_path / WEIGHTS).write_bytes(weights(header, 4))
    with pytest.raises(CheckpointError, match=f"damaged header .*{reason}"):
        SafetensorsFile(tmp_path / WEIGHTS)


@pytest.mark.parametrize(
    ("header", "data_bytes", "complaint"),
    [
        (f'{{"a": {tensor("[2]", 0, 8)}, "b": {tensor("[2]", 4, 12)}}}', 12, "'a' and 'b' overlap"),
        (f'{{"b": {tensor("[2]", 0, 8)}, "a": {tensor("[2]", 0, 8)}}}', 8, "'b' and 'a' overlap"),
        (f'{{"a": {tensor("[1]", 0, 4)}, "b": {tensor("[1]", 8, 12)}}}', 12, "'a' and 'b' have 4 bytes of no tensor"),
        (f'{{"a": {tensor("[1]", 4, 8)}}}', 8, "the header and 'a' have 4 bytes of no tensor"),
    ],
)
def test_tensors_fill_a_file_without_overlap(tmp_path: Path, header: str, data_bytes: int, complaint: str) -> None:
    """The safetensors library refuses such a file, too."""
    (tmp_path / WEIGHTS).write_bytes(weights(header, data_bytes))
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(tmp_path / WEIGHTS, "np").__enter__()
    with pytest.raises(CheckpointError, match=complaint):
        SafetensorsFile(tmp_path / WEIGHTS)


def test_a_header_lists_tensors_in_any_order(tmp_path: Path) -> None:
    header = f'{{"b": {tensor("[1]", 4, 8)}, "none": {tensor("[0]", 4, 4)}, "a": {tensor("[1]", 0, 4)}}}  '
    (tmp_path / WEIGHTS).write_bytes(weights(header, 8))
    file = SafetensorsFile(tmp_path / WEIGHTS)
    assert [file.read(name).shape for name in file.names] == [(1,), (0,), (1,)]


def test_an_index_must_match_its_shards(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    index = json.loads((folder / INDEX).read_text())
    edit_json(folder / INDEX, weight_map=index["weight_map"] | {"model.ghost": index["weight_map"][EMBEDDING]})
    with pytest.raises(CheckpointError, match=r"lacks model\.ghost"):
        Checkpoint.open(folder)
    edit_json(folder / INDEX, weight_map=index["weight_map"])
    shard = index["weight_map"]["model.norm.weight"]
    (folder / shard).unlink()
    with pytest.raises(CheckpointNotFoundError, match=shard):
        Checkpoint.open(folder)
    (folder / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (hub_errors.GatedRepoError, CheckpointNotFoundError, r"accept its licence at https://.*HF_TOKEN"),
        (hub_errors.RepositoryNotFoundError, CheckpointNotFoundError, "neither a local folder nor a Hub"),
        (hub_errors.RevisionNotFoundError, CheckpointNotFoundError, "no revision 'v9'"),
        (hub_errors.HfHubHTTPError, CheckpointError, "could not be downloaded"),
    ],
)
def test_refusals_of_the_hub_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Any, kind: type[Exception], message: str
) -> None:
    def refuse(*_args: Any, **_options: Any) -> str:
        raise error("refused", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(kind, match=message):
        Checkpoint.open("org/name", revision="v9")


@pytest.mark.parametrize(
    "error",
    [hub_errors.LocalEntryNotFoundError("x"), hub_errors.OfflineModeIsEnabled("x"), ConnectionError("x")],
)
def test_without_network_the_message_says_so(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(*_args: Any, **_options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointNotFoundError, match="the Hub cannot be reached"):
        Checkpoint.open("org/name")


def test_a_hub_id_opens_its_snapshot(monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tiny_checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert Checkpoint.open("org/name", revision="v1", token="secret").folder == tiny_checkpoint
    assert (asked["repo"], asked["revision"], asked["token"]) == ("org/name", "v1", "secret")
    assert {"*.safetensors", "slices.csv"} <= set(asked["allow_patterns"])
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])


def test_the_chat_template_is_found_wherever_it_is(small: Path) -> None:
    text = (small / "chat_template.jinja").read_text()
    assert Checkpoint.open(small).chat_template() == text
    (small / "chat_template.jinja").unlink()
    assert Checkpoint.open(small).chat_template() is None
    (small / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert Checkpoint.open(small).chat_template() == "from json"
    named = [{"name": "rag", "template": "other"}, {"name": "default", "template": "from list"}]
    edit_json(small / "tokenizer_config.json", chat_template=named)
    assert Checkpoint.open(small).chat_template() == "from list"
    edit_json(small / "tokenizer_config.json", chat_template="from config")
    assert Checkpoint.open(small).chat_template() == "from config"


@pytest.mark.parametrize("name", ["special_tokens_map.json", "generation_config.json", "tokenizer.json", "config.json"])
def test_only_files_of_the_checkpoint_are_copied(small: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("{}")
    (small / name).unlink(missing_ok=True)
    (small / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=f"{name} is a link to a file elsewhere"):
        Checkpoint.open(small).check_tokenizer()


def test_a_snapshot_of_the_hugging_face_cache_is_a_checkpoint(small: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--maker--gemma" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    small.rename(snapshot.parent.parent / "blobs")
    for blob in (snapshot.parent.parent / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    checkpoint = Checkpoint.open(snapshot)
    assert len(checkpoint.tokenizer_files()) == 4 and checkpoint.chat_template()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"frame_length": 10**12}, "frame_length is|fft_length is"),
        ({"max_frequency": 0.0}, "max_frequency_hz is 0.0"),
        ({"hop_length": float("inf")}, "infinity"),
        ({"feature_size": [128]}, "list"),
    ],
)
def test_a_feature_extractor_out_of_range_is_refused(settings: dict[str, Any], reason: str) -> None:
    checkpoint = SimpleNamespace(processor_config=lambda _: {"sampling_rate": 16_000} | settings)
    with pytest.raises(CheckpointError, match=f"feature extractor cannot be used .*({reason})"):
        log_mel_settings(checkpoint)  # type: ignore[arg-type]


def test_tokenizer_files_are_those_present(small: Path) -> None:
    names = [path.name for path in Checkpoint.open(small).tokenizer_files()]
    assert names == [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ]
