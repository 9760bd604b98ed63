"""Expands media placeholders in prompt text to soft tokens, and locates these among the token ids.

A placeholder is spelled as one soft token of its modality, as in transformers' `Gemma3nProcessor`: `<image_soft_token>`
and `<audio_soft_token>`. Other names, such as `<start_of_image>`, stand for no image there either.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby

import numpy as np

from gemma3n_onnx.runtime.artifact import Manifest, SoftTokens
from gemma3n_onnx.runtime.errors import ArtifactError, PromptError
from gemma3n_onnx.runtime.media.reader import Item
from gemma3n_onnx.runtime.tokens import SoftTokenSpan

# What the sources of a modality are called in messages.
SOURCES = {"vision": "images", "audio": "audio clips"}

RunEncoder = Callable[[str, Mapping[str, np.ndarray]], np.ndarray]


class Placeholders:
    """The soft tokens of an artifact's modalities."""

    def __init__(self, manifest: Manifest) -> None:
        self._soft = {modality: info.soft_tokens for modality, info in manifest.encoders.items()}

    @property
    def tokens(self) -> tuple[str, ...]:
        """The placeholders that a chat template writes for an image and for a clip."""
        return tuple(soft.token for soft in self._soft.values())

    def expand(self, rendered: str, items: Sequence[Item]) -> str:
        """Replaces each placeholder of a rendered prompt by start marker, soft tokens and end marker.

        Matches transformers' `Gemma3nProcessor`. PromptError: the placeholders do not match `items`.
        """
        pieces, found = self._split(rendered)
        if found != (wanted := [item.modality for item in items]):
            raise PromptError(
                f"The rendered prompt has placeholders of {', '.join(found) or 'nothing'}, but the messages have "
                f"{', '.join(wanted) or 'no media'}; do not write placeholders into text, and use the checkpoint's "
                "own chat template."
            )
        pieces[1::2] = [_written_out(self._soft[modality]) for modality in found]
        return "".join(pieces)

    def require(self, text: str, counts: Mapping[str, int]) -> None:
        """Raises PromptError unless a raw prompt has one placeholder for each source; `counts` is by modality."""
        _, found = self._split(text)
        for modality, soft in self._soft.items():
            if (written := found.count(modality)) != (given := counts[modality]):
                raise PromptError(
                    f"The number of {soft.token} in the prompt is {written}, but that of {SOURCES[modality]} given "
                    f"with it is {given}; write one for each, in the same order."
                )

    def expand_raw(self, text: str, media: Mapping[str, Sequence[Sequence[Item]]]) -> tuple[str, list[Item]]:
        """Like `expand`, for a raw prompt that `require` accepts; returns the items in their order in the text, too.

        `media`: by modality, the items of each source, several for long audio that was split.
        """
        pieces, found = self._split(text)
        sources = {modality: iter(items) for modality, items in media.items()}
        placed = [next(sources[modality]) for modality in found]
        pieces[1::2] = [_written_out(self._soft[m]) * len(items) for m, items in zip(found, placed)]
        return "".join(pieces), [item for items in placed for item in items]

    def require_expanded(self, ids: Sequence[int], items: Sequence[Item]) -> None:
        """Raises PromptError unless token ids hold the soft tokens of each item in a run of its own, and no others."""
        for modality, soft in self._soft.items():
            given = sum(item.modality == modality for item in items)
            runs = len([*_runs(ids, soft.token_id, soft.count)])
            if runs != given or list(ids).count(soft.token_id) != given * soft.count:
                raise PromptError(
                    f"The number of whole runs of {soft.count} {soft.token} in the token ids is {runs}, but that of "
                    f"{SOURCES[modality]} given with them is {given}; write one run for each, and no others."
                )

    def _split(self, text: str) -> tuple[list[str], list[str]]:
        """Text and placeholders in turn, as `re.split` returns them, and the modalities of the placeholders."""
        modality_of = {soft.token: modality for modality, soft in self._soft.items()}
        if not modality_of:
            return [text], []
        pieces = re.split(f"({'|'.join(map(re.escape, modality_of))})", text)
        return pieces, [modality_of[token] for token in pieces[1::2]]

    def find(self, ids: Sequence[int], items: Sequence[Item], run: RunEncoder) -> tuple[SoftTokenSpan, ...]:
        """The span of each item in the ids of an expanded prompt; `run(modality, inputs)` computes its features.

        `items` are in the order of the prompt within each modality.

        ArtifactError: the tokenizer splits a soft token.
        """
        runs = {modality: _runs(ids, soft.token_id, soft.count) for modality, soft in self._soft.items()}
        spans = []
        for item in items:
            start = next(runs[item.modality], None)
            if start is None:
                raise ArtifactError(
                    f"The tokenizer does not encode {self._soft[item.modality].token} as one token; export the model "
                    "again with the checkpoint's own tokenizer."
                )
            spans.append(SoftTokenSpan(start, self._soft[item.modality].count, item.key, partial(_features, item, run)))
        return tuple(sorted(spans, key=lambda span: span.start))


def _written_out(soft: SoftTokens) -> str:
    return f"{soft.prefix}{soft.token * soft.count}{soft.suffix}"


def _runs(ids: Sequence[int], token_id: int, count: int) -> Iterator[int]:
    """Start positions of runs of exactly `count` tokens `token_id`; the model may have generated a single one."""
    position = 0
    for token, group in groupby(ids):
        length = len(list(group))
        if token == token_id and length == count:
            yield position
        position += length


def _features(item: Item, run: RunEncoder) -> np.ndarray:
    return run(item.modality, item.inputs())
