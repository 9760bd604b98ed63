"""Encodes prompts in any form to token ids and soft-token spans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from gemma3n_onnx.runtime.artifact import Manifest
from gemma3n_onnx.runtime.errors import PromptError
from gemma3n_onnx.runtime.media.fetch import FetchPolicy
from gemma3n_onnx.runtime.media.reader import MediaOptions, MediaReader
from gemma3n_onnx.runtime.tokens import PromptTokens

from .chat_template import ChatTemplate
from .messages import MessageReader, items_of
from .soft_tokens import Placeholders
from .tokenizer import Tokenizer, encode_plain


class FeatureEncoders(Protocol):
    def features(self, modality: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Soft-token embeddings [count, H] fp32 of one image or clip."""
        ...


class PromptEncoder:
    """Encodes prompts; `encoders` only run at prefill."""

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        fetch: FetchPolicy,
        encoders: FeatureEncoders,
    ) -> None:
        self.tokenizer, self.template, self.encoders = tokenizer, template, encoders
        self._vocab_size = manifest.vocab_size
        self._placeholders = Placeholders(manifest)
        self._messages = MessageReader(MediaReader(manifest, fetch), self._placeholders.tokens)

    def encode(self, prompt: Any, media: MediaOptions | None = None) -> PromptTokens:
        """Token ids and soft-token spans of text, token ids or messages.

        Raises:
            PromptError: the prompt cannot be encoded. MediaError: its media cannot be read.
        """
        if not is_messages(prompt):
            return PromptTokens(encode_plain(prompt, self.tokenizer, self._vocab_size))
        messages = self.read(prompt, media or MediaOptions())
        return self.locate(self.tokenizer.encode(self.render(messages), add_bos=True), messages)

    def read(self, messages: Sequence[Mapping[str, Any]], media: MediaOptions) -> list[dict[str, Any]]:
        """Validates messages, reads their media, and returns them in the chat template's form."""
        return self._messages.read(messages, media)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt text of messages from `read`, soft tokens included."""
        if self.template is None:
            raise PromptError("This artifact has no chat template, so the prompt must be text or token ids.")
        return self._placeholders.expand(self.template.render(messages), items_of(messages))

    def locate(self, ids: list[int], messages: Sequence[Mapping[str, Any]]) -> PromptTokens:
        """The token ids of rendered messages, with the spans of their images and clips."""
        return PromptTokens(ids, self._placeholders.find(ids, items_of(messages), self.encoders.features))


def is_messages(prompt: Any) -> bool:
    """Whether a prompt is a list of messages rather than text or token ids."""
    return isinstance(prompt, list | tuple) and bool(prompt) and not isinstance(prompt[0], int | np.integer)
