"""Slices: the published table, the rules, the cuts against transformers, the parameter counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemma3n_onnx.export.checkpoint.sizes import (
    E4B,
    disk_bytes,
    encoder_parameter_counts,
    parameter_counts,
    published_total,
    render_table,
    slices_table,
)
from gemma3n_onnx.export.errors import ExportOptionError, SliceError
from gemma3n_onnx.export.slicing import (
    SliceSpec,
    SliceTable,
    TensorCut,
    dropped,
    find_slice,
    load_slices,
    resolve,
    whole,
)
from gemma3n_onnx.graphs.config import TextConfig

HEADER = "name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped"
HALF = f"[{', '.join(['2_048 * 4'] * 35)}]"
PUBLISHED = load_slices()
SPECS = PUBLISHED.specs
E2B = resolve(find_slice("E2B", PUBLISHED), E4B)
NARROW_HF = {
    "model_type": "gemma3n_text",
    "hidden_size": 32,
    "intermediate_size": [128] * 35,
    "num_hidden_layers": 35,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 60,
    "vocab_size_per_layer_input": 50,
    "hidden_size_per_layer_input": 4,
    "laurel_rank": 4,
    "num_kv_shared_layers": 15,
    "sliding_window": 8,
    "rms_norm_eps": 1e-6,
    "altup_num_inputs": 4,
    "altup_active_idx": 0,
    "max_position_embeddings": 64,
}
NARROW = TextConfig.from_hf(NARROW_HF)


def row(name="mine", layers="35", widths=HALF, skipped="", header=HEADER):
    return f'{header}\n{name},{layers},2.2,60.00%,"{widths}","{skipped}"\n'


def load(tmp_path: Path, text: str) -> SliceTable:
    path = tmp_path / "slices.csv"
    path.write_text(text, encoding="utf-8")
    return load_slices(path)


# --- the published slices


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_published_slice_resolves_and_has_the_published_size(spec):
    slice_ = resolve(spec, E4B)
    assert slice_.config.intermediate_sizes == spec.widths
    assert slice_.skipped == spec.skipped
    # The published figures of the mixed slices are up to 0.02 B above the true counts.
    assert parameter_counts(slice_.config).effective / 1e9 == pytest.approx(spec.effective_params_b, abs=0.02)


@pytest.mark.parametrize(
    ("name", "effective"),
    [
        ("E4B", 3_980_491_248),
        ("E2B", 1_905_495_648),
        ("E1.96B-layer", 1_955_827_296),
        ("E2.54B-layer", 2_520_873_456),
        ("E2.49B-block", 2_470_541_808),
        ("E3.79B-layer", 3_779_164_656),
        ("E3.79B-block", 3_728_833_008),
    ],
)
def test_effective_parameters_are_exact(name, effective):
    assert parameter_counts(resolve(find_slice(name, PUBLISHED), E4B).config).effective == effective


def test_published_slices_have_names_of_their_own():
    assert len({spec.name for spec in SPECS}) == len(SPECS) >= 16
    assert [s.name for s in SPECS if s.skipped] == ["E2B", "E1.96B-layer"]


def test_e2b_slice_has_the_architecture_of_e2b():
    assert E2B.keep == (*range(20), *range(25, 35))
    assert E2B.config.num_kv_shared_layers == 10
    assert (E2B.config.kv_source(20), E2B.config.kv_source(29)) == (18, 19)
    assert E2B.config.activation_sparsity == (0.95,) * 10 + (0.0,) * 20


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_narrow_checkpoint_scales_every_published_slice(spec):
    sliced = resolve(spec, NARROW).config
    assert sliced.intermediate_sizes == tuple(width // 128 for width in spec.widths)
    assert resolve(spec, sliced).keep == tuple(range(sliced.num_layers))


# --- names


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("e2b", "E2B"),
        (" Main model ", "E4B"),
        ("Config for official E2B Model", "E2B"),
        ("Config for E2.54B (layer-level)", "E2.54B-layer"),
        ("E2.49B", "E2.49B-block"),
        ("e2.98b-LAYER", "E2.98B-layer"),
    ],
)
def test_names_resolve(asked, found):
    assert find_slice(asked, PUBLISHED).name == found


@pytest.mark.parametrize("short", ["E2.98B", "E3.79B"])
def test_ambiguous_name_names_both(short):
    with pytest.raises(SliceError, match=f"choose {short}-layer or {short}-block"):
        find_slice(short, PUBLISHED)


def test_unknown_name_names_the_nearest():
    with pytest.raises(SliceError, match=r"'E2.55B-layer' in the published table; the nearest are .*E2.54B-layer"):
        find_slice("E2.55B-layer", PUBLISHED)
    with pytest.raises(SliceError, match="its slices are E4B, E2B"):
        find_slice("llama", PUBLISHED)


# --- the user's table


def test_published_csv_as_users_have_it(tmp_path):
    text = "\ufeff" + row("Config for E2.54B (layer-level)", widths=str(list(find_slice("E2.54B", PUBLISHED).widths)))
    text += '\nConfig for official E2B Model, 30, 1.91, 50.90%, "[' + "2_048 * 4, " * 30 + ']", "[20, 21, 22,23,24]"\n'
    table = load(tmp_path, text)
    first, second = table.specs
    assert first.widths == find_slice("E2.54B", PUBLISHED).widths
    assert (second.widths, second.skipped, second.mmlu) == ((8192,) * 30, (20, 21, 22, 23, 24), 50.9)
    assert find_slice("E2.54B", table) is first
    assert resolve(second, E4B).config == E2B.config


def test_tidy_columns_and_own_names(tmp_path):
    table = load(tmp_path, 'name,layers,ffn_hidden_dims,layers_skipped\nMy Slice,2,"[64, 2 * 3_2]",\n')
    assert find_slice("my slice", table) == SliceSpec("My Slice", (64, 64))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no slices"),
        (HEADER, "no slices"),
        ("name,# Layers\n", "line 1: column 'FFN Hidden Dims' is missing"),
        ("name,layers,# Layers\n", "line 1: columns 'layers' and '# Layers' mean the same"),
        ("\0\1", "binary"),
        (row(layers="34"), "line 2, column '# Layers': 34 layers, but 'FFN Hidden Dims' has 35"),
        (row(layers="x"), "line 2, column '# Layers': 'x' is not an integer"),
        (row(name=""), "line 2, column 'name': empty"),
        (row(widths="[2 ** 3]"), "line 2, column 'FFN Hidden Dims': entry 0, '2 \\*\\* 3'"),
        (row(widths="[__import__('os')]"), "column 'FFN Hidden Dims': entry 0"),
        (row(widths="[1, 2"), "bracket"),
        (row(layers="0", widths="[]"), "line 2: column FFN hidden dims is empty"),
        (row(layers="1", widths="[0]"), "line 2: column FFN hidden dims: layer 0 has width 0"),
        (row(layers="1", widths="[-2 * 8]"), "width -16; a width must be positive"),
        (row(skipped="[20, 20]"), "line 2: column Layers skipped: layer 20 is repeated"),
        (row(skipped="[-1]"), "Layers skipped: -1 is not a layer number"),
        (row() + row().split("\n")[1], "line 3, column 'name': 'mine' is already the slice of line 2"),
        (f"{HEADER}\nmine,2,2.0,60%,[1, 2],\n", "line 2: 7 cells under 6 columns"),
        (row().replace("2.2", "nan"), "column '# Effective Params \\(B\\)': 'nan' is not a number"),
        (f'{HEADER}\nmine,1,2.0,60%,"[1]"x,\n', "line 2: not a CSV row"),
    ],
)
def test_table_refusals_say_where_and_why(tmp_path, text, message):
    with pytest.raises(SliceError, match=message):
        load(tmp_path, text)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(SliceError, match="no slice table"):
        load_slices(tmp_path / "none.csv")
    with pytest.raises(SliceError, match="cannot be read"):
        load_slices(tmp_path)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    with pytest.raises(SliceError, match="not UTF-8"):
        load_slices(tmp_path / "binary")


# --- the table of a checkpoint's own


def test_a_given_csv_goes_before_the_checkpoints_own_and_that_before_the_published_table(tmp_path):
    tables = {name: tmp_path / f"{name}.csv" for name in ("given", "own")}
    for name, path in tables.items():
        path.write_text(row(name), encoding="utf-8")
    for arguments, source, first in (
        ((tables["given"], tables["own"]), str(tables["given"]), "given"),
        ((None, tables["own"]), str(tables["own"]), "own"),
        ((None, None), "the published table", "E4B"),
    ):
        table = load_slices(*arguments)
        assert (table.source, table.specs[0].name) == (source, first)


def test_widths_of_a_checkpoints_own_table_are_absolute(tmp_path):
    path = tmp_path / "slices.csv"
    path.write_text(row("E2B", widths=str([64] * 35)), encoding="utf-8")
    spec = find_slice("E2B", load_slices(None, path))
    assert resolve(spec, NARROW).config.intermediate_sizes == (64,) * 35


# --- the rules against a checkpoint


def cut(skipped: tuple[int, ...] = (), width: int = 8192, layers: int | None = None) -> SliceSpec:
    return SliceSpec("mine", (width,) * (35 - len(skipped) if layers is None else layers), skipped)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (cut(layers=34), "35.*list of widths must have one entry for each kept layer"),
        (cut((20, 21), layers=35), "one entry for each kept layer"),
        (cut((20, 21, 22, 23, 24), layers=35, width=16384), "one entry for each kept layer"),
        (cut(width=16416), "layer 0: FFN width 16416 is above the checkpoint's 16384"),
        (cut(width=8200), "8200 is not a multiple of 32"),
        (cut((35,)), "skips layer 35, but the checkpoint's layers are 0 to 34"),
        (cut((18,)), "skips layer 18, a KV donor: layers 20, 21.* no donor of their type, sliding_attention"),
        (cut((19,)), "skips layer 19, a KV donor: layers 24, 29, 34 .* full_attention"),
        (cut(tuple(range(20, 35))), "skips all KV-shared layers, 20 to 34"),
    ],
)
def test_rule_is_refused_with_its_reason(spec, message):
    with pytest.raises(SliceError, match=message):
        resolve(spec, E4B)


def test_skipping_a_producer_that_is_no_donor_is_allowed():
    sliced = resolve(cut((3,)), E4B).config
    assert (sliced.num_kv_layers, sliced.num_kv_shared_layers) == (19, 15)
    assert (sliced.kv_source(33), sliced.kv_source(32)) == (18, 17)


def test_e2b_weights_are_e2b_already_and_nothing_larger():
    already = resolve(find_slice("E2B", PUBLISHED), E2B.config)
    assert already == whole(E2B.config, "E2B", 50.9)
    for larger in ("E4B", "E1.96B", "E2.54B"):
        with pytest.raises(SliceError, match="can only remove layers"):
            resolve(find_slice(larger, PUBLISHED), E2B.config)


def test_full_size_widths_are_never_scaled():
    half = replace(E4B, intermediate_sizes=(8192,) * 35)
    assert set(resolve(find_slice("E2B", PUBLISHED), half).config.intermediate_sizes) == {8192}
    with pytest.raises(SliceError, match="16384 is above the checkpoint's 8192"):
        resolve(find_slice("E4B", PUBLISHED), half)


@pytest.mark.parametrize(
    ("widths", "message"),
    [((3,) * 35, "3 / 16384 is not an integer"), ((64,) * 34 + (128,), "differ in FFN width")],
)
def test_scaling_needs_one_divisible_width(widths, message):
    with pytest.raises(SliceError, match=message):
        resolve(find_slice("E2B", PUBLISHED), replace(NARROW, intermediate_sizes=widths))


# --- cuts


def test_cuts_of_e2b():
    groups = ((0, 20 * 256), (25 * 256, 35 * 256))
    assert E2B.source_of("embed_tokens_per_layer.weight") == TensorCut("embed_tokens_per_layer.weight", columns=groups)
    assert E2B.source_of("per_layer_model_projection.weight").rows == groups
    assert E2B.source_of("layers.20.mlp.up_proj.weight") == TensorCut("layers.25.mlp.up_proj.weight", ((0, 8192),))
    assert E2B.source_of("layers.3.mlp.down_proj.weight").columns == ((0, 8192),)
    assert E2B.source_of("norm.weight") == TensorCut("norm.weight")
    with pytest.raises(SliceError, match="only 30 layers"):
        E2B.source_of("layers.30.input_layernorm.weight")
    with pytest.raises(SliceError, match="donor"):
        E2B.source_of("layers.20.self_attn.k_proj.weight")


def take(array: np.ndarray, cut: TensorCut) -> np.ndarray:
    for axis, ranges in enumerate((cut.rows, cut.columns)):
        if ranges is not None:
            array = np.concatenate([array.take(range(*r), axis) for r in ranges], axis)
    return array


def build(hf_config):
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    return Gemma3nForCausalLM(Gemma3nTextConfig(**hf_config)).model


@pytest.mark.parametrize("name", ["E2B", "E1.96B-layer", "E2.69B-layer"])
def test_cut_state_dict_loads_strictly_and_equals_brute_force(name):
    import torch

    slice_ = resolve(find_slice(name, PUBLISHED), NARROW)
    source = {key: value.numpy() for key, value in build(NARROW_HF).state_dict().items()}
    # Checkpoints still have K and V of the shared layers.
    extra = {f"layers.{i}.self_attn.{part}.weight": np.zeros(1) for i in range(20, 35) for part in ("k_proj", "v_proj")}
    sliced_hf = slice_.hf_config(NARROW_HF)
    model = build(sliced_hf)
    cuts = {key: slice_.source_of(key) for key in model.state_dict()}
    used = [cut.source for cut in cuts.values()]
    assert len(used) == len(set(used))
    assert set(used) | dropped(source | extra, slice_) == set(source | extra)
    assert not set(used) & dropped(source | extra, slice_)

    state = {key: take(source[cut.source], cut) for key, cut in cuts.items()}
    model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()}, strict=True)

    kept = [i for i in range(35) if i not in slice_.skipped]
    table = source["embed_tokens_per_layer.weight"].reshape(50, 35, 4)[:, kept].reshape(50, -1)
    np.testing.assert_array_equal(state["embed_tokens_per_layer.weight"], table)
    projection = source["per_layer_model_projection.weight"].reshape(35, 4, 32)[kept].reshape(-1, 32)
    np.testing.assert_array_equal(state["per_layer_model_projection.weight"], projection)
    for new, old in enumerate(kept):
        width = slice_.config.intermediate_sizes[new]
        for part, wanted in (
            ("gate_proj", np.s_[:width]),
            ("up_proj", np.s_[:width]),
            ("down_proj", np.s_[:, :width]),
        ):
            expected = source[f"layers.{old}.mlp.{part}.weight"][wanted]
            np.testing.assert_array_equal(state[f"layers.{new}.mlp.{part}.weight"], expected)


@pytest.mark.parametrize("full", [True, False])
def test_hf_config_describes_the_slice(full):
    slice_ = resolve(find_slice("E1.96B", PUBLISHED), NARROW)
    original = {"model_type": "gemma3n", "text_config": NARROW_HF} if full else NARROW_HF
    sliced = slice_.hf_config(original)
    assert TextConfig.from_hf(sliced) == slice_.config
    assert TextConfig.from_hf(original) == NARROW
    assert sliced.get("text_config", sliced)["num_kv_shared_layers"] == 10


# --- sizes


def test_published_totals_of_e2b():
    from transformers import Gemma3nConfig

    counts = parameter_counts(E2B.config)
    assert counts.text == 4_456_156_768
    assert counts.effective == 1_905_495_648
    assert counts.ple_table == 262144 * 30 * 256
    assert counts.token_embedding == 262400 * 2048
    # Text, the untied head, and the encoders without the stem bias that timm added later.
    assert published_total(E2B.config, Gemma3nConfig().to_dict()) == 5_976_833_408


def test_counts_agree_with_transformers():
    import torch
    from transformers import Gemma3nConfig
    from transformers.models.gemma3n import modeling_gemma3n as hf

    def count(module):
        return sum(p.numel() for p in module.parameters())

    config = Gemma3nConfig()
    encoders = encoder_parameter_counts(config.to_dict())
    with torch.device("meta"):
        assert count(hf.Gemma3nAudioEncoder(config.audio_config)) == encoders["audio_tower"]
        assert count(hf.Gemma3nMultimodalEmbedder(config.audio_config, config.text_config)) == encoders["embed_audio"]
        assert count(hf.Gemma3nMultimodalEmbedder(config.vision_config, config.text_config)) == encoders["embed_vision"]
        text = count(build(NARROW_HF))
    counts = parameter_counts(NARROW)
    assert text == counts.text - counts.unused_kv


def test_reduced_vision_tower_is_not_guessed():
    from transformers import Gemma3nConfig

    config = Gemma3nConfig().to_dict()
    config["vision_config"]["model_args"] = {"channel_multiplier": 0.03}
    with pytest.raises(SliceError, match="not known"):
        encoder_parameter_counts(config)


def test_disk_bytes_leave_out_unused_kv():
    # 30 layers: text, less K, V and k_norm of 10 shared layers; 2 bytes each.
    wanted = 2 * (4_456_156_768 - 10 * (2 * 512 * 2048 + 256))
    assert disk_bytes(E2B.config, "fp16") == disk_bytes(E2B.config, "bf16") == wanted
    assert disk_bytes(E2B.config, "fp32") == 2 * wanted
    # What fills KV caches is there once more in int8: 19 of 30 layers, K, V and Q of another, the inputs' projections.
    layer = 3 * 2048 * 8192 + 2 * 2048 * 2048 + 2 * 512 * 2048 + 2 * 2048 * 256 + 2 * 2048 * 64
    prefill = 19 * layer + 2048 * 3072 + 3 * 2048 * 2048 + 2048 * 30 * 256
    per_layer = 262_144 * 30 * 256
    for precision, bits, of_per_layer in (("int8", 8 + 1 / 8, 8 + 1 / 8), ("int4", 4 + 1 / 8, 4 + 1 / 2)):
        of_text = (wanted / 2 - per_layer) * bits / 8 + per_layer * of_per_layer / 8
        assert disk_bytes(E2B.config, precision) == pytest.approx(of_text + prefill, rel=0.005)
    with pytest.raises(ExportOptionError, match="Unknown precision 'fp8'"):
        disk_bytes(E2B.config, "fp8")


def test_table_lists_what_a_checkpoint_can_be_cut_to():
    text = render_table(slices_table())
    lines = text.splitlines()
    assert len(lines) == 1 + len(SPECS)
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split()[:7] == ["E2B", "30", "1.91", "1.91", "4.46", "5.98", "50.9"]
    e2b = slices_table()[1]
    assert (e2b.total, e2b.text, e2b.effective) == (5_976_833_408, 4_456_156_768, 1_905_495_648)
    assert [row.name for row in slices_table(E2B.config, {})] == ["E2B"]
