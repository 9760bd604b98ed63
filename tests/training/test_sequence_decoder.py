"""What is trained is what is exported: the same logits as the exported modules', for every slice."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call

from gemma3n_onnx.export.pipeline import tensor_shapes
from gemma3n_onnx.export.slicing import load_slices, resolve
from gemma3n_onnx.graphs.config import TextConfig
from gemma3n_onnx.graphs.decoder import Decoder
from gemma3n_onnx.graphs.embedding import Embedding, HardRows
from gemma3n_onnx.runtime.prompt import Tokenizer
from gemma3n_onnx.training import text
from gemma3n_onnx.training.checkpoint import demo_config, write_companions
from gemma3n_onnx.training.conversations import random_conversation
from gemma3n_onnx.training.decoder import HEAD, PER_LAYER, TOKENS, SlicedModel, initial_weights
from gemma3n_onnx.training.optimizer import MUON_LR, Optimizer
from gemma3n_onnx.training.pictures import random_picture
from gemma3n_onnx.training.prompts import SOFT_TOKENS, Encoder
from gemma3n_onnx.training.sounds import random_sound

SLICES = load_slices(Path(__file__).parents[2] / "demo" / "slices.csv").specs
TOLERANCE = 1e-5  # of the logits' range; fp32, the same sums in another order


@pytest.fixture(scope="module")
def config():
    return TextConfig.from_hf(demo_config())


@pytest.fixture(scope="module")
def weights(config):
    rng = torch.Generator().manual_seed(0)
    initial = initial_weights(tensor_shapes(config), config, rng)
    # Initial norms and gates are constants; here every value counts.
    return {name: (w.detach() * (1 + 0.2 * torch.randn(w.shape, generator=rng))) for name, w in initial.items()}


@pytest.fixture(scope="module")
def batch(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_companions(folder, demo_config())
    rng, draw = np.random.default_rng(0), torch.Generator().manual_seed(1)
    pictures, sounds = [random_picture(rng) for _ in range(2)], [random_sound(rng) for _ in range(2)]
    features = (torch.randn(2, count, config.hidden_size, generator=draw).half() for count in SOFT_TOKENS.values())
    picture_features, sound_features = features
    media = text.Media(pictures, picture_features, sounds, sound_features)
    encoder = Encoder(folder)
    return text.random_batch(rng, "both", 4, media, encoder), encoder.soft_ids


def exported(weights, chosen, hard_rows, soft_ids, batch):
    """Logits of the modules that an export traces, at the positions of the targets."""
    config = chosen.config
    cut = {}
    for name in tensor_shapes(config):
        source = chosen.source_of(name)
        tensor = weights[source.source]
        for axis, ranges in enumerate((source.rows, source.columns)):
            if ranges is not None:
                tensor = tensor.index_select(axis, torch.cat([torch.arange(*r) for r in ranges]))
        cut[name] = tensor
    embedding = Embedding(
        config, torch.float32, HardRows(config.vocab_size - len(hard_rows), len(hard_rows)), tuple(soft_ids.tolist())
    )
    tables = {
        TOKENS: torch.cat([cut[TOKENS], hard_rows / math.sqrt(config.hidden_size)]),
        PER_LAYER: cut.pop(PER_LAYER) * math.sqrt(config.hidden_size_per_layer_input),
    }
    kinds = [int(i) for row in batch.ids for i in row if i in soft_ids]
    features = [batch.features[[kind == soft for kind in kinds]] for soft in soft_ids.tolist()]
    embeds, rows = functional_call(embedding, tables, (batch.ids, features))
    decoder = Decoder(config, "all")
    cut[HEAD] = cut.pop(TOKENS)
    length = batch.ids.shape[1]
    mask = (torch.arange(length) < batch.lengths[:, None]).long()
    positions = torch.arange(length).expand_as(batch.ids)
    past = [torch.zeros(len(mask), config.num_kv_heads, 0, config.head_dim)] * (2 * config.num_kv_layers)
    logits = functional_call(decoder, cut, (embeds, rows, mask, positions, past))[0]
    return logits[batch.targets >= 0]


@pytest.mark.parametrize("spec", SLICES, ids=lambda spec: spec.name)
def test_a_slice_in_training_is_the_slice_that_is_exported(config, weights, batch, spec):
    sequences, soft_ids = batch
    chosen = resolve(spec, config)
    hard_rows = torch.randn(256, config.hidden_size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = exported(weights, chosen, hard_rows, soft_ids, sequences)
        found = SlicedModel(chosen).logits(weights, hard_rows, soft_ids, sequences)
    error = ((found - expected).abs().max() / (expected.max() - expected.min())).item()
    print(f"{spec.name}: {error:.1e} of the range, {sequences.ids.shape[1]} tokens")
    assert sequences.ids.shape[1] > 2 * config.sliding_window
    assert error < TOLERANCE


def test_every_weight_of_the_whole_model_is_trained(config, weights, batch):
    sequences, soft_ids = batch
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    whole = SlicedModel(resolve(SLICES[0], config))
    whole.loss(leaves, torch.randn(256, config.hidden_size), soft_ids, sequences).backward()
    untrained = [name for name, leaf in leaves.items() if leaf.grad is None or not leaf.grad.abs().sum() > 0]
    # The last layer's inactive streams leave it through nothing but the mean of the unembedded streams.
    assert untrained == []


def test_only_answers_are_learned(tmp_path):
    write_companions(tmp_path, demo_config())
    encoder, tokenizer = Encoder(tmp_path), Tokenizer.from_folder(tmp_path)
    rng = np.random.default_rng(5)
    for _ in range(20):
        conversation = random_conversation(rng, random_picture(rng), random_sound(rng))
        ids, targets = encoder.encode(conversation)
        learned = [target for target in targets if target >= 0]
        assert all(target in (-1, following) for target, following in zip(targets, ids[1:]))
        expected = "".join(f"{turn.answer}<end_of_turn>" for turn in conversation.turns)
        assert tokenizer.decode(learned, skip_special=False) == expected


def test_the_optimizer_finds_a_minimum():
    torch.manual_seed(0)
    target, offset = torch.randn(12, 8), 0.3 * torch.randn(8)
    matrix, vector = torch.zeros(12, 8, requires_grad=True), torch.zeros(8, requires_grad=True)
    steps = 400
    optimizer = Optimizer([matrix], [vector], steps)
    losses = [
        optimizer.step([(matrix - target).square().mean(), (vector - offset).square().mean()]) for _ in range(steps)
    ]
    assert losses[-1] < 0.02 * losses[0]
    assert (matrix - target).abs().max() < 4 * MUON_LR
