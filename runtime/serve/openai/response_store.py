"""Responses that later requests may name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma3n_onnx.runtime.serve.not_found import NotFoundError

MAX_BYTES = 64 << 20


class UnknownResponseError(NotFoundError):
    """No response or item of this id is kept."""


@dataclass(frozen=True)
class _Kept:
    """`items`: the conversation up to the response, its own output included."""

    response: Mapping[str, Any]
    items: Sequence[Mapping[str, Any]]
    bytes: int


class ResponseStore:
    """In memory, up to `max_bytes` of text and data; the responses used longest ago go first."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def keep(self, response: Mapping[str, Any], conversation: Sequence[Mapping[str, Any]]) -> None:
        """Keeps a response with the items before it; one that is larger than the store is not kept."""
        items = [*conversation, *response["output"]]
        kept = _Kept(response, items, _characters([response, items]))
        self._kept[response["id"]] = kept
        self._bytes += kept.bytes
        while self._bytes > self._max_bytes:
            self._bytes -= self._kept.popitem(last=False)[1].bytes

    def response(self, response_id: str) -> dict[str, Any]:
        """Raises UnknownResponseError, as the other methods."""
        return dict(self._find(response_id).response)

    def conversation(self, response_id: str) -> list[dict[str, Any]]:
        return [dict(item) for item in self._find(response_id).items]

    def item(self, item_id: str) -> dict[str, Any]:
        """An item of the output of any kept response."""
        for kept in reversed(self._kept.values()):
            for item in kept.response["output"]:
                if item["id"] == item_id:
                    return dict(item)
        raise UnknownResponseError(f"The item {item_id!r} is not kept here (any more); send the item itself.")

    def delete(self, response_id: str) -> None:
        self._find(response_id)
        self._bytes -= self._kept.pop(response_id).bytes

    def _find(self, response_id: str) -> _Kept:
        if response_id not in self._kept:
            raise UnknownResponseError(
                f"The response {response_id!r} is not kept here (any more); send the whole conversation as input."
            )
        self._kept.move_to_end(response_id)
        return self._kept[response_id]


def _characters(value: Any) -> int:
    """Characters of all names and texts of a JSON value."""
    if isinstance(value, Mapping):
        return sum(_characters(key) + _characters(each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return sum(map(_characters, value))
    return len(value) if isinstance(value, str) else 8
