"""Validates messages, reads their media, and converts them to the form that chat templates take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gemma3n_onnx.runtime.errors import PromptError, no_document
from gemma3n_onnx.runtime.media.budget import current_budget
from gemma3n_onnx.runtime.media.reader import DETAILS, Item, MediaOptions, MediaReader

# Accepted roles, and their names in chat templates.
TEMPLATE_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "model": "assistant",
}
# Roles and keys that are passed unchanged to a template with tools.
TOOL_ROLES = {"tool": "tool"}
TOOL_KEYS = ("tool_calls", "tool_call_id", "name")
# Types of OpenAI's Responses API, and the same of chat completions.
SAME_TYPES = {"input_text": "text", "output_text": "text", "refusal": "text", "input_image": "image_url"}
# Keys of a part's source, by part type; OpenAI's types nest it in an object.
SOURCE_KEYS = {
    "image": ("image", "url", "path", "base64"),
    "image_url": ("image_url",),
    "audio": ("audio", "url", "path", "base64"),
    "audio_url": ("audio_url",),
    "input_audio": ("input_audio",),
    "video": ("video", "url", "path", "base64"),
    "video_url": ("video_url",),
}
MEDIA = {kind: "audio" if "audio" in kind else kind.removesuffix("_url") for kind in SOURCE_KEYS}
MEDIA_TYPES = (*SOURCE_KEYS, *(written for written, kind in SAME_TYPES.items() if kind in SOURCE_KEYS))
KNOWN_TYPES = ("text", *SOURCE_KEYS)
# Types of OpenAI's chat completions and Responses API for files of other kinds.
FILE_TYPES = ("file", "input_file")
TEMPLATE_TYPES = {"vision": "image", "audio": "audio"}


class MessageReader:
    """Validates messages {"role", "content"} and reads their media.

    Content is text or a list of parts: {"type": "text", "text": ...}, {"type": "image" | "audio" | "video",
    <type>: source}, or OpenAI's image_url, audio_url, input_audio and video_url. `placeholders` are tokens that
    text may not contain, because templates write them in place of media. With `tools`, messages may have the role tool
    and tool calls.
    """

    def __init__(self, media: MediaReader, placeholders: Sequence[str], tools: bool = False) -> None:
        self._media, self._placeholders = media, tuple(placeholders)
        self._roles = TEMPLATE_ROLES | TOOL_ROLES if tools else TEMPLATE_ROLES
        self._kept_keys = TOOL_KEYS if tools else ()

    def read(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: MediaOptions,
        hide: Callable[[Any], Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Messages in the template's form; content that is null, missing or an empty list becomes empty text.

        `hide` is applied to every text, and to all that a template with tools is given.

        Media become parts {"type": "image" | "audio", <type>: Item}, one for each video frame and each piece of a
        long clip. `read` is idempotent. The parts of a system message are joined, because Gemma's template reads
        only one.

        Raises:
            PromptError: a malformed message, or no user message. MediaError: media that cannot be read.
        """
        if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
            raise PromptError(f"Messages must be a list, not {type(messages).__name__}.")
        numbers = Counter[str]()
        current_budget().count(sources_of(messages))
        read = [self._message(message, index, options, hide, numbers) for index, message in enumerate(messages)]
        if not any(message["role"] == "user" for message in read):
            raise PromptError("The messages must include at least one user message.")
        return read

    def _message(
        self,
        message: Any,
        index: int,
        options: MediaOptions,
        hide: Callable[[Any], Any] | None,
        numbers: Counter[str],
    ) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise PromptError(f"Message {index} must be a mapping with role and content, not {_shown(message)}.")
        written = message.get("role")
        role = self._roles.get(written) if isinstance(written, str) else None
        if role is None:
            raise PromptError(f"Message {index} has role {written!r}; use one of {', '.join(self._roles)}.")
        kept = {key: message[key] for key in self._kept_keys if message.get(key) is not None}
        if hide is not None and kept:
            kept = hide(kept)
        content = message.get("content")
        if content is None or content == []:
            content = ""
        if isinstance(content, str):
            return {"role": role, "content": self._text(content, index, hide), **kept}
        if not isinstance(content, (list, tuple)):
            raise PromptError(f"The content of message {index} must be text or a list of parts, not {_shown(content)}.")
        parts: list[dict[str, Any]] = []
        for part in content:
            kind = _type_of(part, index)
            if kind == "text":
                parts.append({"type": "text", "text": self._text(part.get("text", part.get("refusal")), index, hide)})
            elif role != "user":
                raise PromptError(f"Message {index} of role {written} has {kind}; only user messages may have media.")
            else:
                parts += [_part_of(item) for item in self._read(part, kind, index, options, numbers)]
        if role == "system":
            parts = [{"type": "text", "text": "".join(part["text"] for part in parts)}]
        return {"role": role, "content": parts, **kept}

    def _text(self, text: Any, index: int, hide: Callable[[Any], Any] | None) -> str:
        if not isinstance(text, str):
            raise PromptError(f"A text part of message {index} must have a string as its text.")
        if hide is not None:
            return hide(text)
        for token in self._placeholders:
            if token in text:
                raise PromptError(
                    f"The text of message {index} contains {token}, a placeholder for media; remove it, and give the "
                    "media as a separate part."
                )
        return text

    def _read(
        self, part: Mapping[str, Any], kind: str, index: int, options: MediaOptions, numbers: Counter[str]
    ) -> list[Item]:
        """`numbers` counts the sources read so far, by medium."""
        source = _source(part, kind, index)
        if isinstance(source, Item):
            return [source]
        medium = MEDIA[kind]
        numbers[medium] += 1
        if medium == "image":
            return self._media.image(source, options, _detail(part, kind, index), number=numbers[medium])
        if medium == "video":
            return self._media.video(source, options, number=numbers[medium])
        return self._media.clips(source, options, part.get("rate"), number=numbers[medium])


def without_media(messages: Sequence[Any]) -> list[Any]:
    """Messages as clients send them, without the parts that are media."""
    return [
        {**message, "content": [part for part in message["content"] if not _is_media(part)]}
        if isinstance(message, Mapping) and isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _is_media(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in MEDIA_TYPES


def sources_of(messages: Sequence[Any]) -> list[Any]:
    """What the media parts of messages are read from, before anything is validated; None for a part without."""
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
    typed = [(part, part.get("type")) for part in parts if isinstance(part, Mapping)]
    kinds = [(part, SAME_TYPES.get(kind, kind)) for part, kind in typed if isinstance(kind, str)]
    sources = [_given(part, kind) for part, kind in kinds if kind in SOURCE_KEYS]
    return [source for source in sources if not isinstance(source, Item)]


def items_of(messages: Sequence[Mapping[str, Any]]) -> list[Item]:
    """The media of messages from `MessageReader.read`, in order."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    return [part[part["type"]] for part in parts if part["type"] != "text"]


def warnings_of(messages: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What the files of their media lack."""
    return tuple(warning for item in items_of(messages) for warning in item.warnings)


def _part_of(item: Item) -> dict[str, Any]:
    kind = TEMPLATE_TYPES[item.modality]
    return {"type": kind, kind: item}


def _type_of(part: Any, index: int) -> str:
    if not isinstance(part, Mapping) or "type" not in part:
        raise PromptError(f"A part of message {index} must be a mapping with a type, not {_shown(part)}.")
    kind = part["type"]
    kind = SAME_TYPES.get(kind, kind) if isinstance(kind, str) else kind
    if kind in FILE_TYPES:
        holder = part["file"] if isinstance(part.get("file"), Mapping) else part
        named = f" ({_shown(name)})" if (name := holder.get("filename")) else ""
        raise no_document(f"Message {index} has a part of type {kind!r}{named}")
    if kind not in KNOWN_TYPES:
        raise PromptError(f"Message {index} has a part of type {kind!r}; use one of {', '.join(KNOWN_TYPES)}.")
    return kind


def _source(part: Mapping[str, Any], kind: str, index: int) -> Any:
    source = _given(part, kind)
    if source is None:
        raise PromptError(
            f"A part of message {index} is of type {kind!r} but has no {' or '.join(SOURCE_KEYS[kind])} to read from."
        )
    return source


def _given(part: Mapping[str, Any], kind: str) -> Any:
    """The source of a part: {"image": source}, {"image_url": {"url": source}}, {"input_audio": {"data": source}}."""
    given = [part[key] for key in SOURCE_KEYS[kind] if part.get(key) is not None]
    source = given[0] if given else None
    if isinstance(source, Mapping):
        return source.get("data" if kind == "input_audio" else "url")
    return source


def _detail(part: Mapping[str, Any], kind: str, index: int) -> str | None:
    holder = part.get(kind)
    detail = (holder if isinstance(holder, Mapping) else part).get("detail") if kind == "image_url" else None
    if detail not in (None, "auto", *DETAILS):
        raise PromptError(
            f"An image of message {index} has the detail {detail!r}; use one of auto, {', '.join(DETAILS)}."
        )
    return detail


def _shown(value: Any) -> str:
    """A short form of `value` for error messages: it may be an image of megabytes."""
    text = repr(value) if isinstance(value, str | int | float | None | Mapping | list | tuple) else type(value).__name__
    return text if len(text) <= 80 else f"{text[:80]}…"
