"""The conversation of `gemma3n chat`, whose turns can be answered again, dropped, saved and continued."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma3n_onnx.runtime.chat import Turn
from gemma3n_onnx.runtime.errors import ContextLengthError, PromptError
from gemma3n_onnx.runtime.generation.result import Timings
from gemma3n_onnx.runtime.media.reader import MediaOptions
from gemma3n_onnx.runtime.model import OnnxGemma3n

Messages = list[dict[str, Any]]
LONGEST_SOURCE = 300  # characters of a path or a URL that are shown; longer ones are data


@dataclass(frozen=True)
class Question:
    """The content of a user's message with its media read, and with their sources instead."""

    read: Any
    saved: Any


@dataclass(frozen=True)
class Exchange:
    """A user's message and what follows it up to the next one, in both forms."""

    read: Messages
    saved: Messages

    @property
    def question(self) -> Question:
        return Question(self.read[0]["content"], self.saved[0]["content"])


@dataclass(frozen=True)
class Answered:
    """What an answer took: its timings, and how many of the oldest exchanges were dropped for it."""

    timings: Timings
    dropped: int


class Conversation:
    """`exchanges` are the conversation; `unanswered` is the last question if Ctrl-C or an error ended its answer.

    `options` of its methods are those of `OnnxGemma3n.generate`; `show` is given the answer's pieces as they come.
    """

    def __init__(self, model: OnnxGemma3n, system: str | None) -> None:
        self._chat = model.chat(system)
        self.system = system
        self.exchanges: list[Exchange] = []
        self.unanswered: Question | None = None

    @classmethod
    def continued(cls, model: OnnxGemma3n, saved: Messages, media: MediaOptions) -> Conversation:
        """The conversation that `saved` was.

        Raises:
            PromptError: it does not begin with a message of the user's, which a system prompt may precede; or as
                `OnnxGemma3n.read`. MediaError: as `OnnxGemma3n.read`.
        """
        saved = [message | {"content": message.get("content") or ""} for message in saved]
        read = model.read(saved, media)
        has_system = read[0]["role"] in ("system", "developer")
        conversation = cls(model, text_of(read[0]["content"]) if has_system else None)
        begins = [place for place, message in enumerate(read) if message["role"] == "user"]
        if begins[0] != has_system:
            raise PromptError("The conversation begins with an answer; give one that begins with a question.")
        for begin, end in zip(begins, [*begins[1:], len(read)]):
            conversation.exchanges.append(Exchange(read[begin:end], saved[begin:end]))
        return conversation

    def saved(self) -> Messages:
        """All messages, with the sources of media."""
        return [*self._system(), *(message for exchange in self.exchanges for message in exchange.saved)]

    def ask(
        self, question: Question, options: Mapping[str, Any], show: Callable[[Iterable[str]], None], drop_oldest: bool
    ) -> Answered:
        """Raises ContextLengthError: the context is full, and no exchanges are left to drop, or none may be."""
        return self._answer(question, self.exchanges, options, show, drop_oldest)

    def retry(self, options: Mapping[str, Any], show: Callable[[Iterable[str]], None], drop_oldest: bool) -> Answered:
        """Answers the last question again; its old answer stays until there is a new one.

        Raises:
            PromptError: there is no question. ContextLengthError: as of `ask`.
        """
        if self.unanswered is not None:
            return self._answer(self.unanswered, self.exchanges, options, show, drop_oldest)
        if not self.exchanges:
            raise PromptError("There is no message to answer again; ask something first.")
        *before, last = self.exchanges
        try:
            return self._answer(last.question, before, options, show, drop_oldest)
        finally:
            self.unanswered = None

    def _answer(
        self,
        question: Question,
        before: Sequence[Exchange],
        options: Mapping[str, Any],
        show: Callable[[Iterable[str]], None],
        drop_oldest: bool,
    ) -> Answered:
        self.unanswered = question
        turn, dropped = self._started(question, before, options, drop_oldest)
        with contextlib.closing(iter(turn)) as pieces:
            show(pieces)
        asked, reply = self._chat.messages[-2:]
        saved = [{"role": "user", "content": question.saved}, reply]
        self.exchanges = [*before[dropped:], Exchange([asked, reply], saved)]
        self.unanswered = None
        return Answered(turn.result.timings, dropped)

    def _started(
        self, question: Question, before: Sequence[Exchange], options: Mapping[str, Any], drop_oldest: bool
    ) -> tuple[Turn, int]:
        """The answer as it begins, and how many exchanges were dropped to make room for it."""
        dropped = 0
        while True:
            kept = [message for exchange in before[dropped:] for message in exchange.read]
            self._chat.messages = [*self._system(), *kept]
            try:
                return self._chat.stream(question.read, **options), dropped
            except ContextLengthError:
                if not drop_oldest or dropped == len(before):
                    raise
                dropped += 1

    def _system(self) -> Messages:
        return [] if self.system is None else [{"role": "system", "content": self.system}]


def text_of(content: Any) -> str:
    """The text of a message; its media in brackets, by their paths or URLs, or by their type if they are data."""
    if isinstance(content, str):
        return content
    return " ".join(part["text"] if "text" in part else f"[{_source_of(part)}]" for part in content)


def _source_of(part: Mapping[str, Any]) -> str:
    kind = str(part["type"])
    source = part.get(kind)
    if isinstance(source, Mapping):  # OpenAI's parts
        source = source.get("url")
    return source if isinstance(source, str) and len(source) <= LONGEST_SOURCE else kind
