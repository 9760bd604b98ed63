"""Encodes prompts in any form to token ids and soft-token spans."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from gemma3n_onnx.runtime.artifact import Manifest
from gemma3n_onnx.runtime.errors import PromptError, no_template
from gemma3n_onnx.runtime.media.budget import current_budget
from gemma3n_onnx.runtime.media.fetch import FetchPolicy
from gemma3n_onnx.runtime.media.reader import Item, MediaOptions, MediaReader
from gemma3n_onnx.runtime.tokens import PromptTokens

from .chat_template import ChatTemplate
from .conversation import holds_every_text, merge_turns, texts_of
from .messages import TOOL_KEYS, MessageReader, items_of, warnings_of
from .plain_text import PlainText
from .soft_tokens import Placeholders
from .tokenizer import Tokenizer, encode_plain

RawMedia = Mapping[str, list[list[Item]]]
"""By modality, the items of each source of a prompt without messages."""


@dataclass(frozen=True)
class TemplateOptions:
    """How messages become a prompt.

    Attributes:
        add_generation_prompt: open the model's turn after the last message.
        continue_final_message: leave the turn of the last message, the assistant's, open, so that the answer continues
            it; as `apply_chat_template` of transformers.
        tools: functions as JSON schemas, given to a template that reads them.
        variables: further variables of the template.
        control_tokens: whether the spelling of a control token in a message becomes that token, as in transformers.
            False for text that comes from strangers: it could close its turn and open another.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    control_tokens: bool = True


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
        self._plain_text = PlainText(tokenizer)
        with_tools = template is not None and template.reads_tools
        self._media = MediaReader(manifest, fetch)
        self._messages = MessageReader(self._media, self._placeholders.tokens, with_tools)

    def encode(
        self,
        prompt: Any,
        media: MediaOptions | None = None,
        template: TemplateOptions | None = None,
        *,
        images: list[Any] | None = None,
        audio: list[Any] | None = None,
    ) -> PromptTokens:
        """Token ids and soft-token spans of text, token ids or messages.

        `template` is for messages; `images` and `audio` are for the placeholders of text, in their order, or for soft
        tokens that are written out in token ids.

        Raises:
            PromptError: the prompt cannot be encoded, or has other placeholders than media. MediaError: its media
            cannot be read.
        """
        if not is_messages(prompt):
            return self.encode_raw(prompt, self.read_raw(prompt, images, audio, media or MediaOptions()))
        if _sources("images", images) or _sources("audio", audio):
            raise PromptError("images and audio belong to a text prompt; put those of messages into their content.")
        options = template or TemplateOptions()
        messages = self.read(prompt, media or MediaOptions(), control_tokens=options.control_tokens)
        return self.locate(self._plain_text.encode(self.render(messages, options)), messages)

    def read_raw(
        self, prompt: Any, images: list[Any] | None, audio: list[Any] | None, options: MediaOptions
    ) -> RawMedia:
        """The media of a prompt that is text or token ids. Raises as `encode`."""
        pictures, clips = _sources("images", images), _sources("audio", audio)
        if isinstance(prompt, str):
            self._placeholders.require(prompt, {"vision": len(pictures), "audio": len(clips)})
        current_budget().count([*pictures, *clips])
        return {
            "vision": [self._media.image(source, options, number=i) for i, source in enumerate(pictures, start=1)],
            "audio": [self._media.clips(source, options, number=i) for i, source in enumerate(clips, start=1)],
        }

    def encode_raw(self, prompt: Any, media: RawMedia) -> PromptTokens:
        """Like `encode` for text or token ids, with media that are read."""
        if isinstance(prompt, str):
            self._placeholders.require(prompt, {modality: len(sources) for modality, sources in media.items()})
            prompt, items = self._placeholders.expand_raw(prompt, media)
            ids = encode_plain(prompt, self.tokenizer, self._vocab_size)
        else:
            ids = encode_plain(prompt, self.tokenizer, self._vocab_size)
            items = [item for sources in media.values() for source in sources for item in source]
            if items:
                self._placeholders.require_expanded(ids, items)
        spans = self._placeholders.find(ids, items, self.encoders.features)
        return PromptTokens(ids, spans, tuple(warning for item in items for warning in item.warnings))

    def read(
        self, messages: Sequence[Mapping[str, Any]], media: MediaOptions, *, control_tokens: bool = True
    ) -> list[dict[str, Any]]:
        """Validates messages, reads their media, and returns them in the chat template's form. Without
        `control_tokens`, the spellings of control tokens are hidden from the template and the tokenizer."""
        return self._messages.read(messages, media, None if control_tokens else self._plain_text.hide_all)

    def render(self, messages: Sequence[Mapping[str, Any]], options: TemplateOptions | None = None) -> str:
        """The prompt text of messages from `read`, soft tokens included.

        If the template rejects the conversation or drops one of its texts, turns are merged first.
        """
        if self.template is None:
            raise no_template("messages cannot be rendered")
        options = options or TemplateOptions()
        if not options.control_tokens:
            hide = self._plain_text.hide_all
            options = replace(options, tools=hide(options.tools), variables=hide(dict(options.variables)))
        return self._placeholders.expand(_render(self.template, messages, options), items_of(messages))

    def locate(self, ids: list[int], messages: Sequence[Mapping[str, Any]]) -> PromptTokens:
        """The token ids of rendered messages, with the spans and the warnings of their images and clips."""
        spans = self._placeholders.find(ids, items_of(messages), self.encoders.features)
        return PromptTokens(ids, spans, warnings_of(messages))


def _sources(name: str, given: Any) -> list[Any]:
    if given is not None and not isinstance(given, list):
        raise PromptError(f"{name} must be a list with one source for each placeholder, not {type(given).__name__}.")
    return given or []


def _render(template: ChatTemplate, messages: Sequence[Mapping[str, Any]], options: TemplateOptions) -> str:
    if any(key in message for message in messages for key in TOOL_KEYS):
        return _render_as_given(template, messages, options)
    if options.continue_final_message:
        return _render_as_given(template, merge_turns(messages), options)
    try:
        rendered = _render_as_given(template, messages, options)
        if holds_every_text(rendered, messages):
            return rendered
    except PromptError:
        pass
    return _render_as_given(template, merge_turns(messages), options)


def _render_as_given(template: ChatTemplate, messages: Sequence[Mapping[str, Any]], options: TemplateOptions) -> str:
    if not options.continue_final_message:
        return template.render(messages, options.add_generation_prompt, options.tools, options.variables)
    if messages[-1]["role"] != "assistant":
        raise PromptError("continue_final_message needs an assistant message last; add one, or leave it out.")
    if not any(text.strip() for text in texts_of(messages[-1]["content"])):
        return template.render(messages[:-1], True, options.tools, options.variables)
    marked = [*messages[:-1], {**messages[-1], "content": _ended(messages[-1]["content"], _END)}]
    rendered = template.render(marked, False, options.tools, options.variables)
    if _END not in rendered:
        raise PromptError("The chat template drops the last message, so it cannot be continued; send it whole.")
    return rendered[: rendered.rindex(_END)]


# Marks the end of the continued message; random, so that no text holds it by chance.
_END = f"\ue002{secrets.token_hex(8)}\ue003"


def _ended(content: str | Sequence[Mapping[str, Any]], mark: str) -> Any:
    """Content whose last text that is not blank ends with a mark, without whitespace before it: templates trim it."""
    if isinstance(content, str):
        return content.rstrip() + mark
    parts = [part for part in content if part["type"] != "text" or part["text"].strip()]
    last = max(place for place, part in enumerate(parts) if part["type"] == "text")
    return [*parts[:last], {"type": "text", "text": parts[last]["text"].rstrip() + mark}, *parts[last + 1 :]]


def is_messages(prompt: Any) -> bool:
    """Whether a prompt is a list of messages rather than text or token ids."""
    return isinstance(prompt, list | tuple) and bool(prompt) and not isinstance(prompt[0], int | np.integer)
