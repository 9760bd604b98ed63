"""transformers' whole model and processor as the oracle for prompts with images and clips.

Messages are in transformers' form, their media in memory: images as PIL images, clips as pairs (samples, rate).

Shape legend: N positions, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor, Gemma3nForConditionalGeneration, GenerationConfig, SiglipImageProcessorPil
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nAudioEncoderModelOutput

from gemma3n_onnx.runtime import MediaOptions, OnnxGemma3n
from media import RATE_HZ, photo, speech
from oracle import TOLERANCE, Greedy, assert_close, generate_greedily

NO_FRAME = 1e9  # no value of a mel frame
SIZE = 256  # pixels: the smallest that the encoder takes, and the fastest
OPTIONS = MediaOptions(image_size=SIZE)
SENTENCES = (
    "The birch canoe slid on the smooth planks.",
    "Glue the sheet to the dark blue background.",
    "It is easy to tell the depth of a well.",
)
# Not the plain sky: on it the random vision tower enlarges the rounding of fp32 a hundred times, in transformers
# as in the artifact; both are then 5e-5 of the range from logits in fp64.
PHOTOGRAPHS = (
    ("china.jpg", (0, 150, 400, 427)),
    ("flower.jpg", (0, 0, 640, 427)),
    ("flower.jpg", (200, 150, 640, 427)),
)

Messages = Sequence[Mapping[str, Any]]


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


@functools.cache
def image(number: int = 0) -> dict[str, Any]:
    """A part of a photograph, another for each number."""
    name, box = PHOTOGRAPHS[number]
    return {"type": "image", "image": photo(name).crop(box)}


@functools.cache
def clip(number: int = 0) -> dict[str, Any]:
    """A part of synthesized speech, another for each number."""
    return {"type": "audio", "audio": speech(SENTENCES[number], RATE_HZ)}


def user(*content: Mapping[str, Any] | str) -> dict[str, Any]:
    return {"role": "user", "content": [text(part) if isinstance(part, str) else part for part in content]}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [text(content)]}


@dataclass(frozen=True)
class Inputs:
    """What the processor makes of messages; `media` are the model's further arguments."""

    ids: list[int]
    media: dict[str, torch.Tensor] = field(default_factory=dict)


class MultimodalOracle:
    def __init__(self, model: Gemma3nForConditionalGeneration, processor: Any) -> None:
        self.model, self.processor = model, processor
        model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        _run_once_for_each_picture(model.model.vision_tower)
        _run_each_clip_alone(model.model)

    @classmethod
    def load(cls, folder: Path) -> MultimodalOracle:
        model = Gemma3nForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        processor = AutoProcessor.from_pretrained(folder)
        # The other backend resizes with torchvision, whose last grey level differs from Pillow's.
        processor.image_processor = SiglipImageProcessorPil.from_pretrained(folder)
        return cls(model.eval(), processor)

    def inputs(self, messages: Messages, size: int = SIZE) -> Inputs:
        parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
        images = [part["image"] for part in parts if part["type"] == "image"]
        clips = [part["audio"][0] for part in parts if part["type"] == "audio"]
        plain = [{"role": message["role"], "content": _without_media(message["content"])} for message in messages]
        rendered = self.processor.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
        return self.text_inputs(rendered, images, clips, size, add_special_tokens=False)

    def text_inputs(
        self,
        prompt: str,
        images: Sequence[Any] = (),
        clips: Sequence[np.ndarray] = (),
        size: int = SIZE,
        **text_options: bool,
    ) -> Inputs:
        """`images` and `clips` for the soft tokens in the text."""
        made = self.processor(
            text=[prompt],
            images=[images] if images else None,
            audio=clips or None,
            return_tensors="pt",
            text_kwargs=text_options,
            images_kwargs={"size": {"height": size, "width": size}},
        )
        media = {"pixel_values": made["pixel_values"]} if images else {}
        if clips:
            media |= self._clip_inputs(clips)
        return Inputs(made["input_ids"][0].tolist(), media)

    def _clip_inputs(self, clips: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """Features of each clip by itself, padded with `NO_FRAME`."""
        alone = [self.processor.feature_extractor(clip) for clip in clips]
        features, masks = (
            [torch.from_numpy(extracted[key][0]) for extracted in alone]
            for key in ("input_features", "input_features_mask")
        )
        return {
            "input_features": pad_sequence(features, batch_first=True, padding_value=NO_FRAME),
            "input_features_mask": pad_sequence(masks, batch_first=True),
        }

    def logits(self, ids: Sequence[int], media: Mapping[str, torch.Tensor], last: int | None = None) -> np.ndarray:
        """fp32 [N, V] at the `last` (or all) positions of `ids`, in one pass without a cache."""
        with torch.no_grad():
            outputs = self.model(torch.tensor([list(ids)]), use_cache=False, logits_to_keep=last or len(ids), **media)
        return outputs.logits[0].numpy()

    def tokens(self, inputs: Inputs, steps: int) -> list[int]:
        """transformers' own greedy generation, with its cache; no token ends it."""
        ids = torch.tensor([inputs.ids])
        with torch.no_grad():
            made = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, **inputs.media)
        return made[0, len(inputs.ids) :].tolist()


def assert_equals_transformers(
    what: str, model: OnnxGemma3n, oracle: MultimodalOracle, messages: Messages, steps: int = 16, size: int = SIZE
) -> Greedy:
    """The same token ids, the same logits at every step, and so the same greedy tokens."""
    inputs = oracle.inputs(messages, size)
    prompt = model.encode(messages, MediaOptions(image_size=size))
    assert prompt.ids == inputs.ids
    ours = generate_greedily(model, prompt.ids, steps, prompt.spans)
    theirs = oracle.logits(ours.oracle_ids, inputs.media, steps)
    assert_close(f"{what}, {len(prompt)} tokens", ours.logits, theirs, TOLERANCE)
    assert_same_choices(ours, theirs)
    return ours


def assert_same_choices(ours: Greedy, theirs: np.ndarray) -> None:
    """Equal maxima of the logits [N, V]; prints the closest call, which no rounding may decide."""
    second, first = np.sort(theirs, axis=-1)[:, -2:].T
    print(f"the second choice is {(first - second).min():.1e} behind at the least")
    assert ours.tokens == theirs.argmax(-1).tolist()


def _without_media(content: Any) -> Any:
    return (
        content
        if isinstance(content, str)
        else [{key: part[key] for key in ("type", "text") if key in part} for part in content]
    )


def _run_once_for_each_picture(tower: torch.nn.Module) -> None:
    """Keeps the outputs of transformers' vision tower, which takes seconds for a picture."""
    forward, seen = tower.forward, {}

    def remembering(pixel_values: torch.Tensor, **options: Any) -> BaseModelOutputWithPooling:
        outputs = []
        for pixels in pixel_values:
            key = (tuple(pixels.shape), pixels.numpy().tobytes())
            if key not in seen:
                seen[key] = forward(pixel_values=pixels[None], **options).last_hidden_state
            outputs.append(seen[key])
        return BaseModelOutputWithPooling(last_hidden_state=torch.cat(outputs))  # a copy: the model scales it in place

    tower.forward = remembering


def _run_each_clip_alone(model: torch.nn.Module) -> None:
    """Has transformers hear the clips of a prompt one by one, as the artifact does.

    In a batch the last token of a shorter clip depends on the others: on the samples, or the outputs of the first
    convolution, that it is padded with.
    """
    hear = model.get_audio_features

    def alone(features: torch.Tensor, left_out: torch.Tensor, **options: Any) -> Gemma3nAudioEncoderModelOutput:
        counts = (features != NO_FRAME).all(-1).sum(-1)
        heard = [
            hear(clip[None, :count], mask[None, :count], **options)
            for clip, mask, count in zip(features, left_out, counts, strict=True)
        ]
        return Gemma3nAudioEncoderModelOutput(
            pooler_output=pad_sequence([each.pooler_output[0] for each in heard], batch_first=True),
            audio_mel_mask=pad_sequence(
                [each.audio_mel_mask[0] for each in heard], batch_first=True, padding_value=True
            ),
        )

    model.get_audio_features = alone


def round_weights(oracle: MultimodalOracle, dtype: torch.dtype) -> None:
    """Rounds the weights as an artifact stores them: for hard tokens it has embeddings made of the whole weights."""
    embedders = oracle.model.model.embed_vision, oracle.model.model.embed_audio
    whole = copy.deepcopy(embedders)
    with torch.no_grad():
        for parameter in oracle.model.parameters():
            parameter.copy_(parameter.to(dtype))
    for embedder, exact in zip(embedders, whole, strict=True):
        embedder.forward = functools.partial(_embed_rounded, embedder.forward, exact, dtype)


def _embed_rounded(
    forward: Callable[..., torch.Tensor],
    exact: torch.nn.Module,
    dtype: torch.dtype,
    input_ids: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
) -> torch.Tensor:
    padding_of_clips = input_ids is not None and input_ids.numel() == 1  # is computed in the encoder's graph
    if input_ids is None or padding_of_clips:
        return forward(input_ids, inputs_embeds)
    return exact(input_ids).to(dtype).float()
