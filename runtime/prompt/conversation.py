"""Conversations of any shape, merged into the form that every chat template takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SEPARATOR = "\n\n"


def merge_turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One system message at most, then turns that alternate and begin with the user's; no text is lost.

    System messages at the beginning are joined; a later one becomes part of the user's turn. Consecutive turns of one
    role are joined. A conversation that the assistant begins gets an empty user turn first.
    """
    leading = 0
    while leading < len(messages) and messages[leading]["role"] == "system":
        leading += 1
    system: list[dict[str, Any]] = []
    for message in messages[:leading]:
        _append(system, "system", message["content"])
    turns: list[dict[str, Any]] = []
    for message in messages[leading:]:
        role = "user" if message["role"] == "system" else message["role"]
        if not turns and role == "assistant":
            turns.append({"role": "user", "content": ""})
        _append(turns, role, message["content"])
    return [*system, *turns]


def holds_every_text(rendered: str, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each text of the messages, without surrounding whitespace, is part of a rendered prompt."""
    return all(text.strip() in rendered for message in messages for text in texts_of(message["content"]))


def texts_of(content: str | Sequence[Mapping[str, Any]]) -> list[str]:
    return [part["text"] for part in _parts_of(content) if part["type"] == "text"]


def _append(turns: list[dict[str, Any]], role: str, content: str | Sequence[Mapping[str, Any]]) -> None:
    if turns and turns[-1]["role"] == role:
        turns[-1]["content"] = _join(turns[-1]["content"], content)
    else:
        turns.append({"role": role, "content": content})


def _join(first: str | Sequence[Mapping[str, Any]], second: str | Sequence[Mapping[str, Any]]) -> Any:
    if isinstance(first, str) and isinstance(second, str):
        return SEPARATOR.join(text for text in (first, second) if text)
    parts = [dict(part) for part in _parts_of(first)]
    for part in _parts_of(second):
        # Templates trim each text part, which would lose the separator between two.
        if parts and part["type"] == parts[-1]["type"] == "text":
            parts[-1]["text"] = SEPARATOR.join(text for text in (parts[-1]["text"], part["text"]) if text)
        else:
            parts.append(dict(part))
    return parts


def _parts_of(content: str | Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
