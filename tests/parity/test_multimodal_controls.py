"""Proof that the multimodal parity tests can fail: an oracle that takes its media in another way is far away."""

from __future__ import annotations

import contextlib

import pytest
import torch

from multimodal import OPTIONS, clip, image, user
from oracle import TOLERANCE, generate_greedily, relative_error

STEPS = 8
FAR = 10 * TOLERANCE
MESSAGES = [user(image(0), "and", image(1), "and", clip(0), "and", clip(1), "What is it?")]


def pixels(change):
    return lambda _, media: contextlib.nullcontext({**media, "pixel_values": change(media["pixel_values"])})


def sound(change_features=lambda x: x, change_mask=lambda x: x):
    def change(_, media):
        features, mask = media["input_features"], media["input_features_mask"]
        changed = {"input_features": change_features(features), "input_features_mask": change_mask(mask)}
        return contextlib.nullcontext(media | changed)

    return change


def without(*names):
    return lambda _, media: contextlib.nullcontext({key: media[key] for key in media if key not in names})


def soft_tokens_scaled(embedder):
    @contextlib.contextmanager
    def change(model, media):
        module = getattr(model, embedder)
        forward = module.forward

        def scaled(input_ids=None, inputs_embeds=None):
            soft = inputs_embeds is not None
            return forward(input_ids, inputs_embeds) * (model.config.text_config.hidden_size**0.5 if soft else 1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "forward", scaled)
            yield media

    return change


@contextlib.contextmanager
def padded_with_another_row(model, media):
    """transformers pads clips with the last token of the vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "vocab_size", model.vocab_size - 1)
        yield media


CHANGES = {
    "images swapped": pixels(lambda x: x.flip(0)),
    "image features left out": without("pixel_values"),
    "blue and red swapped": pixels(lambda x: x.flip(1)),
    "rows and columns swapped": pixels(lambda x: x.transpose(2, 3)),
    "pixels from -1 to 1": pixels(lambda x: 2 * x - 1),
    "pixels from 0 to 255": pixels(lambda x: 255 * x),
    "clip features left out": without("input_features", "input_features_mask"),
    "clips swapped": sound(lambda x: x.flip(0), lambda x: x.flip(0)),
    "audio mask inverted": sound(change_mask=torch.logical_not),
    "image tokens scaled by sqrt(hidden)": soft_tokens_scaled("embed_vision"),
    "clip tokens scaled by sqrt(hidden)": soft_tokens_scaled("embed_audio"),
    "clips padded with another embedding": padded_with_another_row,
}


@pytest.fixture(scope="module")
def ours(shallow_multimodal_model):
    prompt = shallow_multimodal_model.encode(MESSAGES, OPTIONS)
    return generate_greedily(shallow_multimodal_model, prompt.ids, STEPS, prompt.spans)


def error_against(oracle, ours, change):
    with change(oracle.model.model, oracle.inputs(MESSAGES).media) as media:
        return relative_error(ours.logits, oracle.logits(ours.oracle_ids, media, STEPS))


def test_unchanged_media_are_near(shallow_multimodal_oracle, ours):
    error = error_against(shallow_multimodal_oracle, ours, lambda _, media: contextlib.nullcontext(media))
    print(f"nothing changed: error {error:.2e} of the range")
    assert error <= TOLERANCE


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_media_are_far(request, shallow_multimodal_oracle, ours, change):
    error = error_against(shallow_multimodal_oracle, ours, change)
    print(f"{request.node.callspec.id}: error {error:.2e} of the range (at least {FAR:.0e})")
    assert error >= FAR
