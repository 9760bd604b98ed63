"""onnxruntime-genai's own loop over an exported folder; without the library whoever imports this is skipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from gemma3n_onnx.runtime.media.reader import Item
from gemma3n_onnx.runtime.tokens import PromptTokens

og = pytest.importorskip("onnxruntime_genai")

SIZES = {"vision": ("num_image_tokens", 256), "audio": ("audio_sizes", 188)}


def by_inputs(prompt: PromptTokens, items: Sequence[Item] = ()) -> Callable[[Any], None]:
    """Feeds the ids and what the encoders read, as the library's own processor does."""
    tensors = {"input_ids": np.array([prompt.ids], np.int32)}
    for item in items:
        name, count = SIZES[item.modality]
        tensors |= {**item.inputs(), name: np.array([count], np.int64)}

    def feed(generator: Any) -> None:
        named = og.NamedTensors()
        for name, tensor in tensors.items():
            named[name] = tensor
        generator.set_inputs(named)

    return feed


def by_tokens(prompt: PromptTokens) -> Callable[[Any], None]:
    return lambda generator: generator.append_tokens(prompt.ids)


def greedily(
    theirs: Any, prompt: PromptTokens, feed: Callable[[Any], None], new_tokens: int, room: int = 0
) -> tuple[list[int], np.ndarray]:
    """The library's greedy tokens after `feed(generator)`, without the one that ends the answer, and the logits [N, V]
    that they were chosen from. `room`: more positions of the caches, which must hold a window."""
    parameters = og.GeneratorParams(theirs)
    parameters.set_search_options(max_length=len(prompt) + new_tokens + room, do_sample=False)
    generator = og.Generator(theirs, parameters)
    feed(generator)
    tokens, logits = [], []
    while not generator.is_done() and len(tokens) < new_tokens:
        generator.generate_next_token()
        made = generator.get_sequence(0)[len(prompt) :]
        if len(made) > len(tokens):
            tokens.append(int(made[-1]))
            logits.append(generator.get_output("logits").reshape(-1).copy())
    return tokens, np.stack(logits)
