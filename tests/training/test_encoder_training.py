"""The encoders are trained on labels that lie where they ought to, and their soft tokens are those of the encoders."""

from functools import partial

import numpy as np
import pytest
import torch

from gemma3n_onnx.export.text_weights import tensor_shapes
from gemma3n_onnx.graphs.audio import AudioConfig
from gemma3n_onnx.graphs.config import TextConfig
from gemma3n_onnx.graphs.vision import VisionConfig
from gemma3n_onnx.training import audio, vision
from gemma3n_onnx.training.checkpoint import LOG_MEL, demo_config, write_companions
from gemma3n_onnx.training.decoder import TOKENS, initial_weights
from gemma3n_onnx.training.optimizer import MUON_LR, Optimizer, split
from gemma3n_onnx.training.progress import Progress
from gemma3n_onnx.training.prompts import ConversationEncoder
from gemma3n_onnx.training.words import WordClassifier

FP16 = 2e-3  # of a feature; soft tokens are about 1 in size


@pytest.fixture(scope="module")
def pictures():
    return vision.picture_set(0, vision.CHUNK)


@pytest.fixture(scope="module")
def clips():
    return audio.clip_set(0, audio.CHUNK, LOG_MEL)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_companions(folder, demo_config())
    config = TextConfig.from_hf(demo_config())
    rng = torch.Generator().manual_seed(0)
    weights = initial_weights(tensor_shapes(config), config, rng)
    return partial(WordClassifier, embeddings=weights[TOKENS], encoder=ConversationEncoder(folder), rng=rng)


def test_crops_of_pictures_and_labels_show_the_same(pictures):
    rng = torch.Generator().manual_seed(0)
    values, fine, cells = vision._crops(pictures.fine[..., None], pictures, rng)
    assert torch.equal(values[..., 0], fine)
    assert fine.any()
    pixels, fine, cells = vision._crops(pictures.pixels, pictures, rng)
    corners = pixels[:, vision.FINE // 2 :: vision.FINE, vision.FINE // 2 :: vision.FINE].float()
    spread = corners.amax(-1) - corners.amin(-1)
    # Things are colourful, grounds pale.
    assert spread[fine > 0].mean() > 3 * spread[fine == 0].mean()
    inside = vision._repeated(cells["colour"], fine.shape[1])
    assert (inside[fine > 0] == fine[fine > 0]).float().mean() > 0.9


def first(pictures, count):
    cells = {name: labels[:count] for name, labels in pictures.cells.items()}
    return vision.PictureSet(pictures.pictures[:count], pictures.pixels[:count], pictures.fine[:count], cells)


def test_soft_tokens_of_the_training_are_those_of_the_encoder(pictures, clips, words, monkeypatch, capsys):
    for name in ("FIRST_STEPS", "EARLY_STEPS", "LATE_STEPS"):
        monkeypatch.setattr(vision, name, 2)
    for name in ("EARLY_BATCH", "LATE_BATCH"):
        monkeypatch.setattr(vision, name, 4)
    monkeypatch.setattr(audio, "STEPS", 2)
    pictures = first(pictures, 8)
    rng = torch.Generator().manual_seed(0)
    config = demo_config()
    seeing, seen = vision.train_vision(VisionConfig.from_hf(config), pictures, words, rng, Progress())
    pixels = pictures.pixels[:4].permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        expected = seeing(pixels).unflatten(0, (4, -1))
    assert seen.shape == (len(pictures.pictures), 256, 128)
    assert (seen[:4] - expected).abs().max() < FP16 * expected.abs().max()
    hearing, heard = audio.train_audio(AudioConfig.from_hf(config), clips[:8], words, rng, Progress())
    with torch.no_grad():
        expected = hearing(clips[3].features[None], clips[3].mask[None])
    assert (heard[3] - expected).abs().max() < FP16 * expected.abs().max()


def test_every_beep_has_its_token(clips):
    certain = 0
    for clip in clips:
        sure = (clip.onset >= 0).all()
        certain += bool(sure)
        assert int((clip.onset > 0).sum()) == clip.sound.beeps or not sure
        assert (clip.kind[clip.onset > 0] != 0).all()
        assert set(clip.kind.tolist()) - {-1} == {0, 1 + audio.KINDS.index(clip.sound.kind)}
    assert certain > 0.6 * len(clips)


def test_a_convolution_learns_as_the_matrix_that_it_is():
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 8, 3, groups=1)
    depthwise = torch.nn.Conv2d(8, 8, 3, groups=8)
    matrices, others = split(torch.nn.ModuleList([convolution, depthwise]))
    assert [m.shape for m in matrices] == [convolution.weight.shape]
    assert len(others) == 3
    before = convolution.weight.detach().clone()
    optimizer = Optimizer(matrices, others, 100)
    optimizer.step([depthwise(convolution(torch.randn(2, 3, 8, 8))).square().mean()])
    update = np.linalg.svd((convolution.weight.detach() - before).flatten(1).numpy(), compute_uv=False)
    # The first step of a warm-up of thirty; an orthogonalized update's singular values are near 1.
    assert update.max() < 1.6 * MUON_LR / 30
    assert update.min() > 0.3 * MUON_LR / 30
