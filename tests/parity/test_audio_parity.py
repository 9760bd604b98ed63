"""The audio encoder against transformers: what `Gemma3nModel.forward` puts in the place of the audio tokens.

The full-size tower needs 3 GB of disk and 7 GB of memory: pytest -m full_size tests/parity/test_audio_parity.py -s

Shape legend: n clips, T mel frames, B mel bins, G text hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, Gemma3nConfig
from transformers.models.gemma3n import modeling_gemma3n as hf

from gemma3n_onnx.export.trace import trace_audio
from gemma3n_onnx.graphs.audio import AudioConfig, AudioEncoder, checkpoint_shapes
from oracle import SAME_GRAPH, TOLERANCE, assert_close, relative_error

FAR = 10 * TOLERANCE

REDUCED = {"hidden_size": 64, "conf_num_attention_heads": 4, "conf_num_hidden_layers": 2}
TEXT = {
    "vocab_size": 256,
    "vocab_size_per_layer_input": 64,
    "num_hidden_layers": 1,
    "num_kv_shared_layers": 0,
    "layer_types": ["full_attention"],
    "intermediate_size": [32],
    "activation_sparsity_pattern": [0.0],
    "hidden_size_per_layer_input": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
LENGTHS = {"1 s": 98, "5.3 s": 529, "30 s": 2997}  # mel frames
SHORT = (1, 2, 5, 16, 17, 48, 49, 191, 192, 193)
LONGEST = 188 * 16

Weights = dict[str, Tensor]


def hf_config(audio: dict[str, Any], text_hidden: int) -> Gemma3nConfig:
    return Gemma3nConfig(
        text_config={**TEXT, "hidden_size": text_hidden},
        vision_config={"vocab_size": 64, "vocab_offset": 64},
        audio_config={**audio, "vocab_size": 128, "vocab_offset": 128},
        image_token_id=65,
        audio_token_id=129,
    )


def random_weights(config: AudioConfig) -> Weights:
    """Every feature active, activations of the order of one, attention logits of the order of the soft cap."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in checkpoint_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            weights[name] = 1.0 + 0.3 * noise
        elif name.endswith(("per_dim_scale", "embedding.weight")):
            weights[name] = noise
        else:
            gain = 3.0 if "q_proj" in name or "k_proj" in name else 1.0
            weights[name] = noise.mul_(gain * noise[0].numel() ** -0.5)
    return weights


def clips(*frames: int, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Features [n, T, B] like a log-mel's and their mask [n, T]; padding is 0.0 and False."""
    generator = torch.Generator().manual_seed(1)
    length = length or max(frames)
    features, mask = torch.zeros(len(frames), length, 128), torch.zeros(len(frames), length, dtype=torch.bool)
    for row, count in enumerate(frames):
        features[row, :count] = 2.0 * torch.randn(count, 128, generator=generator) - 5.0
        mask[row, :count] = True
    return features, mask


class Case:
    """One config: transformers' model, our module and our graph, all on the same weights."""

    def __init__(self, audio: dict[str, Any], text_hidden: int, folder: Path) -> None:
        hf_full = hf_config(audio, text_hidden)
        self.config = AudioConfig.from_hf(hf_full.to_dict())
        self.weights = random_weights(self.config)
        self.oracle = oracle(hf_full, self.weights)
        self.ours = module(self.config, self.weights)
        self.session = session(self.config, self.weights, folder)

    def theirs(self, features: Tensor, mask: Tensor) -> np.ndarray:
        """What the text model reads where all ids are placeholders, [n, soft tokens, G]."""
        ids = torch.full((len(mask), self.config.soft_tokens), self.oracle.config.audio_token_id)
        read: list[Tensor] = []
        hook = self.oracle.language_model.register_forward_pre_hook(
            lambda _, __, named: read.append(named["inputs_embeds"]), with_kwargs=True
        )
        with torch.no_grad(), hook:
            self.oracle(input_ids=ids, input_features=features, input_features_mask=mask, use_cache=False)
        return read[0].numpy()

    def eager(self, features: Tensor, mask: Tensor) -> np.ndarray:
        return encode(self.ours, features, mask)

    def graph(self, features: Tensor, mask: Tensor) -> np.ndarray:
        inputs = {"input_features": features.numpy(), "input_features_mask": mask.numpy()}
        (out,) = self.session.run(None, inputs)
        return out.reshape(len(mask), self.config.soft_tokens, -1)

    def assert_parity(self, what: str, features: Tensor, mask: Tensor) -> None:
        theirs = self.theirs(features, mask)
        assert_close(f"{what}, torch", self.eager(features, mask), theirs, TOLERANCE)
        assert_close(f"{what}, ONNX Runtime", self.graph(features, mask), theirs, TOLERANCE)


def oracle(config: Gemma3nConfig, weights: Weights) -> hf.Gemma3nModel:
    """Gemma3nModel with its own audio code and a tiny text model; its vision tower does nothing."""

    def from_config(part: Any) -> nn.Module:
        return nn.Identity() if part is config.vision_config else AutoModel.from_config(part)

    with mock.patch.object(hf, "AutoModel", mock.Mock(from_config=from_config)):
        model = hf.Gemma3nModel(config).eval()
    for part in ("audio_tower", "embed_audio"):
        own = {name.removeprefix(f"{part}."): w for name, w in weights.items() if name.startswith(f"{part}.")}
        getattr(model, part).load_state_dict(own, assign=True)
    return model


def module(config: AudioConfig, weights: Weights) -> AudioEncoder:
    encoder = AudioEncoder(config).eval()
    encoder.load_state_dict(weights, assign=True)
    return encoder


def encode(encoder: AudioEncoder, features: Tensor, mask: Tensor) -> np.ndarray:
    with torch.no_grad():
        return encoder(features, mask).unflatten(0, (len(mask), -1)).numpy()


def session(config: AudioConfig, weights: Weights, folder: Path) -> ort.InferenceSession:
    model = trace_audio(config)
    for name, weight in weights.items():
        model.graph.initializers[name].const_value = ir.tensor(weight.numpy())
    ir.save(model, folder / "audio.onnx", external_data="audio.onnx.data")
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(folder / "audio.onnx", options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(REDUCED, 96, tmp_path_factory.mktemp("audio"))


@pytest.mark.parametrize("frames", LENGTHS.values(), ids=LENGTHS)
def test_one_clip_equals_transformers(reduced: Case, frames: int) -> None:
    reduced.assert_parity(f"{frames} frames", *clips(frames))


@pytest.mark.parametrize("frames", [*SHORT, LONGEST])
def test_any_number_of_frames_equals_transformers(reduced: Case, frames: int) -> None:
    reduced.assert_parity(f"{frames} frames", *clips(frames))


@pytest.mark.parametrize("frames", [(529, 300), (98, 529), (2997, 1, 700)])
def test_padded_batches_equal_transformers(reduced: Case, frames: tuple[int, ...]) -> None:
    reduced.assert_parity(f"batch of {frames} frames", *clips(*frames))


def test_any_mask_equals_transformers(reduced: Case) -> None:
    features, mask = clips(529, 529, 529)
    mask[0, 100:180] = False
    mask[1] = False
    mask[2] = torch.rand(529, generator=torch.Generator().manual_seed(2)) > 0.5
    reduced.assert_parity("masks with holes", features, mask)


def test_silence_equals_transformers(reduced: Case) -> None:
    features, mask = clips(529)
    reduced.assert_parity("silence", torch.full_like(features, np.log(1e-5)), mask)


def test_tokens_that_are_padding_are_one_hard_embedding(reduced: Case) -> None:
    out = reduced.graph(*clips(529, 98))
    last_id = torch.tensor([[reduced.oracle.vocab_size - 1]])
    with torch.no_grad():
        padding = reduced.oracle.embed_audio(input_ids=last_id)[0, 0].numpy()
    for row, tokens in enumerate((34, 7)):
        assert relative_error(out[row, tokens:], np.broadcast_to(padding, out[row, tokens:].shape)) <= SAME_GRAPH
        assert np.abs(out[row, :tokens] - padding).max(-1).min() > 0.1


@pytest.mark.parametrize("padding", [1, 12, 229])
def test_a_padded_clip_is_encoded_as_alone(reduced: Case, padding: int) -> None:
    """300 frames are 75 steps. The last step sees what follows its clip, and no token is made of the 75th."""
    alone, padded = (reduced.graph(*clips(300, length=length)) for length in (300, 300 + padding))
    assert_close(f"{padding} frames of padding", padded, alone, SAME_GRAPH)


def test_a_last_step_that_becomes_a_token_sees_the_padding_in_transformers_too(reduced: Case) -> None:
    """98 frames are 25 steps, of which the 25th is the 7th token: the convolutions look two frames ahead."""
    inputs = clips(98), clips(98, length=529)
    for run in (reduced.theirs, reduced.graph):
        alone, padded = (run(*x)[0] for x in inputs)
        different = np.abs(alone - padded).max(-1) > SAME_GRAPH * (alone.max() - alone.min())
        assert different.nonzero()[0].tolist() == [6]


def test_the_graph_refuses_more_frames_than_soft_tokens_hold(reduced: Case) -> None:
    with pytest.raises(Exception, match="Expand"):
        reduced.graph(*clips(LONGEST + 1))


CONFIG_CHANGES = {
    "left context 12": {"context_left": 12},
    "soft cap 40": {"logit_cap": 40.0},
    "no soft cap": {"logit_cap": 1e6},
    "residual weight 1": {"residual_weight": 1.0},
    "group norm epsilon 0.1": {"group_norm_eps": 0.1},
}
WEIGHT_CHANGES = {
    "no per-dimension scale": ("per_dim_scale", 0.0),
    "no relative positions": ("pos_proj.weight", 0.0),
    "no group norm weight": ("conv_0.norm.weight", 1.0),
    "no block norm weight": ("conformer.0.norm.weight", 1.0),
    "no soft embedding norm weight": ("soft_embedding_norm.weight", 1.0),
    "no hard embedding norm weight": ("hard_embedding_norm.weight", 1.0),
}


def print_far(what: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    error = relative_error(ours, theirs)
    print(f"{what}: error {error:.2e} of the range (at least {FAR:.0e})")
    assert error >= FAR


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    return clips(529, 300)


@pytest.mark.parametrize("change", CONFIG_CHANGES.values(), ids=CONFIG_CHANGES)
def test_a_changed_config_is_far(request: Any, reduced: Case, batch: tuple, change: dict[str, Any]) -> None:
    changed = module(dataclasses.replace(reduced.config, **change), reduced.weights)
    print_far(request.node.callspec.id, encode(changed, *batch), reduced.theirs(*batch))


@pytest.mark.parametrize("change", WEIGHT_CHANGES.values(), ids=WEIGHT_CHANGES)
def test_changed_weights_are_far(request: Any, reduced: Case, batch: tuple, change: tuple[str, float]) -> None:
    ending, value = change
    weights = {n: torch.full_like(w, value) if n.endswith(ending) else w for n, w in reduced.weights.items()}
    changed = encode(module(reduced.config, weights), *batch)
    print_far(request.node.callspec.id, changed, reduced.theirs(*batch))


def test_an_inverted_or_forgotten_mask_is_far(reduced: Case, batch: tuple[Tensor, Tensor]) -> None:
    features, mask = batch
    theirs = reduced.theirs(features, mask)
    print_far("inverted mask", reduced.eager(features, ~mask), theirs)
    print_far("no mask", reduced.eager(features, torch.ones_like(mask)), theirs)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("audio")
    yield Case({}, 2048, folder)
    (folder / "audio.onnx.data").unlink()  # pytest would keep it


@pytest.mark.full_size
@pytest.mark.parametrize("frames", [*((count,) for count in LENGTHS.values()), (529, 300)], ids=str)
def test_the_full_tower_equals_transformers(full_size: Case, frames: tuple[int, ...]) -> None:
    assert sum(name.startswith("audio_tower.") for name in full_size.weights) == 269
    full_size.assert_parity(f"full size, {frames} frames", *clips(*frames))
