import json
import math
import shutil
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    Gemma3nForCausalLM,
    Gemma3nForConditionalGeneration,
    Gemma3nProcessor,
    Gemma3nTextConfig,
)

from gemma3n_onnx.export.checkpoint import make_checkpoint as module
from gemma3n_onnx.export.checkpoint.checkpoint import INDEX, Checkpoint
from gemma3n_onnx.export.checkpoint.make_checkpoint import make_checkpoint
from gemma3n_onnx.export.checkpoint.make_tokenizer import SpecialIds, write_tokenizer
from gemma3n_onnx.export.checkpoint.sizes import E4B_CONFIG, encoder_parameter_counts
from gemma3n_onnx.export.errors import ExportError, ExportOptionError
from support import text_checkpoint

SMALL = {"num_hidden_layers": 7, "num_kv_shared_layers": 2}
SENTENCES = [
    "The harbour was quiet.",
    "  two  spaces and a\ttab ",
    "line\n\n\nbreaks\n",
    "Grüße, Київ, 東京, مرحبا, नमस्ते",
    "emoji 😀👩🏽‍🚀 and maths ∮ ∀x",
    "def f(x):\n    return x ** 2  # 1234567890",
    "▁ is a letter too",
]
SYSTEM = {"role": "system", "content": "  Be brief. "}
USER = {"role": "user", "content": " Hello "}
ANSWER = {"role": "assistant", "content": "Hi"}
PARTS = {
    "role": "user",
    "content": [{"type": "image"}, {"type": "text", "text": " What? "}, {"type": "audio"}],
}


def load_strictly(folder: Path, **options: Any) -> Any:
    """The model as transformers loads it, with no key missing, unexpected or of another shape."""
    loaded: Any = Gemma3nForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    model, info = loaded
    assert not any(info.values()), info
    return model


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Any:
    model = load_strictly(tiny_checkpoint, attn_implementation="eager")
    assert model.dtype == torch.float32
    return model.eval()


@pytest.fixture(scope="module")
def raw_tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))


def prompts(rows: int, length: int) -> torch.Tensor:
    ids = torch.randint(494, 1020, (rows, length), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 2
    return ids


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_activations_and_logits_are_in_range_and_vary(model: Any) -> None:
    with torch.no_grad():
        output = model(prompts(4, 48), output_hidden_states=True)
    largest = max(float(state.abs().max()) for state in output.hidden_states)
    assert largest < 10_000
    assert 3 < float(output.logits.std()) < 7
    assert 15 < float(output.logits.abs().max()) < 30
    assert len(set(output.logits.argmax(-1).flatten().tolist())) > 100


def test_greedy_decoding_does_not_collapse(model: Any) -> None:
    ids = prompts(3, 12)
    output = model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False)[:, ids.shape[1] :]
    assert all(len(set(row.tolist())) > 32 for row in output)


def test_attention_is_neither_uniform_nor_one_hot(model: Any) -> None:
    with torch.no_grad():
        attentions = model(prompts(2, 16), output_attentions=True).attentions
    for weights in attentions:
        assert 0.2 < float(weights[..., -1, :].max(-1).values.mean()) < 0.95


def test_tiny_has_the_depth_and_every_feature_of_e4b(tiny_checkpoint: Path) -> None:
    config = Checkpoint.open(tiny_checkpoint).text_config
    _, e4b = module.text_config("e4b", "bfloat16", {})
    for name in ("layer_types", "activation_sparsity", "num_kv_shared_layers", "rope_theta", "num_kv_layers"):
        assert getattr(config, name) == getattr(e4b, name)
    assert config.activation_sparsity == (0.95,) * 10 + (0.0,) * 25


@pytest.mark.parametrize(
    ("size", "text_parameters"),
    [("e2b", 4_456_156_768), ("e4b", None)],
)
def test_real_sizes_have_the_published_parameters(size: str, text_parameters: int | None) -> None:
    text, architecture = module.text_config(size, "bfloat16", {})
    with torch.device("meta"):
        reference = Gemma3nForCausalLM(Gemma3nTextConfig(**text))
    named = dict(reference.model.named_parameters())
    expected = {name: tuple(parameter.shape) for name, parameter in named.items()}
    assert {tensor.name: tensor.shape for tensor in module._tensors(architecture)} == expected
    if text_parameters is not None:
        shared_kv = architecture.num_kv_shared_layers * (2 * 512 * 2048 + 256)
        assert sum(np.prod(shape) for shape in expected.values()) + shared_kv == text_parameters


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    first, again, other = (
        contents(text_checkpoint("tiny", tmp_path / name, seed, overrides=SMALL))
        for name, seed in (("first", 5), ("again", 5), ("other", 6))
    )
    assert first == again
    assert first["model.safetensors"] != other["model.safetensors"]


def test_values_do_not_depend_on_blocks_or_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Checkpoint.open(text_checkpoint("tiny", tmp_path / "whole", overrides=SMALL))
    monkeypatch.setattr(module, "BLOCK_VALUES", 1001)
    cut = Checkpoint.open(text_checkpoint("tiny", tmp_path / "cut", overrides=SMALL, shard_bytes=100_000))
    assert whole.names == cut.names
    assert all(whole.raw_read(name).tobytes() == cut.raw_read(name).tobytes() for name in whole.names)


def test_sharded_bfloat16_loads_strictly(tmp_path: Path) -> None:
    folder = text_checkpoint("tiny", tmp_path / "out", dtype="bfloat16", overrides=SMALL, shard_bytes=300_000)
    index = json.loads((folder / INDEX).read_text())
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards == sorted(set(index["weight_map"].values()))
    model = load_strictly(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert index["metadata"]["total_size"] == sum(p.numel() * 2 for p in model.parameters())


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    text_checkpoint("tiny", tmp_path / "out", overrides=SMALL, progress=lambda *call: calls.append(call))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] == calls[-1][1] == calls[0][1]


def test_an_existing_output_is_replaced_only_by_force(tmp_path: Path) -> None:
    folder = text_checkpoint("tiny", tmp_path / "out", overrides=SMALL)
    before = contents(folder)
    with pytest.raises(ExportError, match="exists already"):
        text_checkpoint("tiny", folder, 1, overrides=SMALL)
    assert contents(folder) == before
    text_checkpoint("tiny", folder, 1, overrides=SMALL, force=True)
    assert contents(folder) != before


def test_force_spares_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ExportError, match="is no checkpoint"):
        text_checkpoint("tiny", tmp_path, force=True)
    assert (tmp_path / "photo.jpg").exists()


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        text_checkpoint("tiny", tmp_path / "out", progress=fail)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(ExportError, match="GB free"):
        text_checkpoint("tiny", tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "huge"}, "Unknown size 'huge'"),
        ({"dtype": "int4"}, "Unknown dtype 'int4'"),
        ({"overrides": {"layers": 3}}, "Unknown override 'layers'"),
        ({"overrides": {"num_kv_shared_layers": 35}}, "do not describe a Gemma 3n"),
        ({"overrides": {"vocab_size": 1100}}, "too small for the tokenizer"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"size": "tiny", "output": tmp_path / "out"} | options
    with pytest.raises(ExportOptionError, match=message):
        make_checkpoint(**arguments)


def test_special_ids_are_gemmas() -> None:
    assert SpecialIds.of_text_vocab(262_144) == SpecialIds(255_999, 256_000, 262_144, 262_145, 262_272, 262_273)
    assert SpecialIds.of_text_vocab(1024) == SpecialIds(1022, 1023, 1024, 1025, 1152, 1153)


@pytest.mark.parametrize("text_vocab", [1024, 262_144])
def test_every_id_decodes_and_special_tokens_have_their_ids(tmp_path: Path, text_vocab: int) -> None:
    write_tokenizer(tmp_path, text_vocab, text_vocab + 256)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == text_vocab + 256
    assert sorted(tokenizer.get_vocab().values()) == list(range(text_vocab + 256))
    for token, token_id in SpecialIds.of_text_vocab(text_vocab).tokens().items():
        assert tokenizer.encode(f"a{token}b", add_special_tokens=False).ids[1] == token_id


@pytest.mark.parametrize("text", SENTENCES)
def test_text_survives_the_round_trip(tiny_checkpoint: Path, raw_tokenizer: Tokenizer, text: str) -> None:
    ids = raw_tokenizer.encode(text).ids
    assert ids[0] == 2
    assert max(ids) < 1024
    assert raw_tokenizer.decode(ids) == text.replace("▁", " ")
    assert AutoTokenizer.from_pretrained(tiny_checkpoint)(text).input_ids == ids


def test_adjacent_newlines_are_one_token(raw_tokenizer: Tokenizer) -> None:
    assert raw_tokenizer.encode("\n\n\n\n", add_special_tokens=False).ids == [110]


def test_transformers_knows_the_multimodal_tokens(tiny_checkpoint: Path, raw_tokenizer: Tokenizer) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert (tokenizer.image_token_id, tokenizer.audio_token_id) == (1025, 1153)
    assert (tokenizer.boi_token, tokenizer.eoa_token) == ("<start_of_image>", "<end_of_audio>")
    text = "<start_of_turn>user\nab<image_soft_token>\n\n<end_of_turn>"
    assert tokenizer(text).input_ids == raw_tokenizer.encode(text).ids


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER], "<bos><start_of_turn>user\nHello<end_of_turn>\n"),
        ([SYSTEM, USER], "<bos><start_of_turn>user\nBe brief.\n\nHello<end_of_turn>\n"),
        (
            [USER, ANSWER, PARTS],
            "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\nHi<end_of_turn>\n"
            "<start_of_turn>user\n<image_soft_token>What?<audio_soft_token><end_of_turn>\n",
        ),
    ],
)
@pytest.mark.parametrize("prompt", [True, False])
def test_the_chat_template_renders_gemmas_turns(
    tiny_checkpoint: Path, messages: list[dict[str, Any]], expected: str, prompt: bool
) -> None:
    expected += "<start_of_turn>model\n" * prompt
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    template = jinja2.Environment().from_string((tiny_checkpoint / "chat_template.jinja").read_text())
    assert rendered == expected
    assert template.render(messages=messages, bos_token="<bos>", add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("messages", [[ANSWER], [USER, USER], [USER, SYSTEM], [SYSTEM, ANSWER]])
def test_roles_must_alternate(tiny_checkpoint: Path, messages: list[dict[str, Any]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    with pytest.raises(jinja2.TemplateError, match="alternate"):
        tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_full_checkpoint_loads_strictly_and_holds_the_text_only_decoder(tmp_path: Path) -> None:
    full = make_checkpoint("tiny", tmp_path / "full", overrides=SMALL)
    loaded: Any = Gemma3nForConditionalGeneration.from_pretrained(full, output_loading_info=True)
    assert not any(loaded[1].values()), loaded[1]
    text = Checkpoint.open(text_checkpoint("tiny", tmp_path / "text", overrides=SMALL))
    checkpoint = Checkpoint.open(full)
    assert checkpoint.text_names() == text.text_names()
    for name in text.text_names():
        np.testing.assert_array_equal(checkpoint.read(name), text.read(name))


@pytest.mark.parametrize("size", ["e2b", "e4b"])
def test_full_sizes_have_the_encoders_of_the_published_models(size: str) -> None:
    config = module.full_config(*module.text_config(size, "bfloat16", {}), vision={}, audio={})
    counts: dict[str, int] = {}
    for tensor in module._encoder_tensors(config):
        part = tensor.name.split(".", 1)[0]
        counts[part] = counts.get(part, 0) + math.prod(tensor.shape)
    assert counts == encoder_parameter_counts(E4B_CONFIG) == encoder_parameter_counts(config)


def test_the_processor_of_a_full_checkpoint_loads(tmp_path: Path) -> None:
    folder = make_checkpoint("tiny", tmp_path / "full", overrides=SMALL)
    processor: Any = AutoProcessor.from_pretrained(folder)
    assert type(processor) is Gemma3nProcessor
    assert processor.image_processor.size == {"height": 768, "width": 768}
    assert (processor.image_seq_length, processor.audio_seq_length) == (256, 188)
