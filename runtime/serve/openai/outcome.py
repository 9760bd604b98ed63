"""What an answer turned out to be: text or tool calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gemma3n_onnx.runtime.serve.answering import Choice

from .tools import CallableTools, may_be_tool_calls, parse_cut_call, parse_tool_calls


@dataclass(frozen=True)
class Outcome:
    """`text` is None where there are calls. `finish` is "stop", "length" or "tool_calls"."""

    text: str | None
    calls: tuple[dict[str, Any], ...]
    finish: str

    @property
    def is_cut(self) -> bool:
        """Whether a limit of tokens ended it."""
        return self.finish == "length"


def outcome_of(choice: Choice, tools: CallableTools) -> Outcome:
    """The outcome of a choice that has ended. A forced call that was cut off is a call with finish "length"."""
    assert choice.end is not None
    if tools.tools and choice.end.reason == "stop" and (calls := parse_tool_calls(choice.text, tools.tools)):
        return Outcome(None, tuple(calls), "tool_calls")
    if tools.forced:
        return Outcome(None, tuple(parse_cut_call(choice.text)), choice.end.reason)
    return Outcome(choice.text, (), choice.end.reason)


class TextHolder:
    """Holds the text of a streamed answer back while it may still become a tool call."""

    def __init__(self, tools: CallableTools) -> None:
        self._forced, self._holds = tools.forced, bool(tools.tools)
        self._sent = 0

    def release(self, choice: Choice) -> slice:
        """The pieces of the choice that can be sent now."""
        self._holds = self._holds and (self._forced or may_be_tool_calls(choice.text))
        return slice(0, 0) if self._holds else self.rest(choice)

    def rest(self, choice: Choice) -> slice:
        """The pieces that have not been sent."""
        sent, self._sent = self._sent, len(choice.pieces)
        return slice(sent, self._sent)
