"""A conversation that keeps its KV cache: each turn prefills only tokens that are not in it yet."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .engine.engine import Engine
from .errors import OptionError, PromptError, no_template
from .generation.result import GenerationResult
from .generation.scheduler import Scheduler
from .generation.stream import GenerationStream
from .options import OptionReader
from .prompt.encoder import PromptEncoder
from .prompt.messages import warnings_of
from .tokens import PromptTokens


class Chat:
    """Created by `OnnxGemma3n.chat`. The warnings of a result are about the media of its own turn.

    `messages` is the conversation so far, with its media decoded; a part of it, or what `OnnxGemma3n.read` returns, may
    replace it.

    One thread at a time may use it; other conversations of the same model may run in other threads.

    Later turns reuse the generated token ids if these decode to the reply; all other text is tokenized.
    """

    def __init__(self, engine: Engine, prompts: PromptEncoder, options: OptionReader, system: str | None) -> None:
        if prompts.template is None:
            raise no_template("it cannot chat")
        if system is not None and not isinstance(system, str):
            raise OptionError(f"system is {system!r}; give the system prompt as text.")
        self._engine, self._prompts, self._options, self._system = engine, prompts, options, system
        self.reset()

    def reset(self) -> None:
        """Drops the conversation, except the system prompt."""
        self.messages: list[dict[str, Any]] = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})
        self._scheduler: Scheduler | None = None
        self._transcript: tuple[str, list[int]] | None = None
        self._current: Turn | None = None

    def send(self, content: str | Sequence[Mapping[str, Any]], **options: Any) -> GenerationResult:
        """The answer to the next user message, text or parts; options and errors as for `OnnxGemma3n.generate`."""
        turn = self.stream(content, **options)
        for _ in turn:
            pass
        return turn.result

    def stream(self, content: str | Sequence[Mapping[str, Any]], **options: Any) -> Turn:
        """Like `send`, but streams pieces of text; a turn that is not iterated to its end is dropped.

        Iterating raises PromptError once the turn has ended or a later one has started.
        """
        self._engine.require_open()
        chosen, media, check = self._options.read(options)
        messages = self._prompts.read([*self.messages, {"role": "user", "content": content}], media)
        rendered = self._prompts.render(messages)
        prompt = replace(self._prompts.locate(self._encode(rendered), messages), warnings=warnings_of(messages[-1:]))
        if self._current is not None:
            self._current.answer.close()
        self._current = None
        engine, tokenizer = self._engine, self._prompts.tokenizer
        with engine.turns:
            scheduler = self._ready_scheduler()
        answer = GenerationStream(
            scheduler, [prompt], chosen, check=check, text_of=tokenizer.token_text, turns=engine.turns
        )
        self._current = Turn(self, answer, [*self.messages, messages[-1]], rendered, prompt)
        return self._current

    def _encode(self, rendered: str) -> list[int]:
        """Token ids of the whole conversation, with the model's turns as generated."""
        tokenizer = self._prompts.tokenizer
        if self._transcript is not None:
            text, ids = self._transcript
            if rendered.startswith(text):
                return ids + tokenizer.encode(rendered[len(text) :], add_bos=False)
        return tokenizer.encode(rendered, add_bos=True)

    def _ready_scheduler(self) -> Scheduler:
        """A scheduler with one row, which keeps the conversation's tokens between turns."""
        if self._scheduler is None:
            context = self._engine.manifest.max_context
            self._scheduler = Scheduler(self._engine, self._prompts.tokenizer, rows=1, capacity=context)
        return self._scheduler

    def _require_current(self, turn: Turn) -> None:
        """Raises PromptError if `turn` is not the current one: the row serves one turn at a time."""
        if self._current is not turn:
            raise PromptError("This turn has ended or a later one has started; send its message again.")

    def _record(self, turn: Turn) -> None:
        """Stores the messages and token ids of a finished turn."""
        result = turn.result
        reply = result.text.strip()
        ids = list(result.token_ids)
        spoken = ids[:-1] if ids[-1] in self._engine.manifest.eos_token_ids else ids
        whole = self._prompts.tokenizer.decode(spoken).strip() == reply
        self._transcript = (turn.rendered + reply, turn.prompt.ids + spoken) if whole else None
        self.messages = [*turn.messages, {"role": "assistant", "content": reply}]


class Turn:
    """One answer of a chat while it is generated."""

    def __init__(
        self,
        chat: Chat,
        answer: GenerationStream,
        messages: list[dict[str, Any]],
        rendered: str,
        prompt: PromptTokens,
    ) -> None:
        self.chat, self.answer, self.messages, self.rendered, self.prompt = chat, answer, messages, rendered, prompt

    def __iter__(self) -> Generator[str, None, None]:
        try:
            self.chat._require_current(self)
            for piece in self.answer:
                yield piece
                self.chat._require_current(self)
            self.chat._record(self)
        finally:
            if self.chat._current is self:
                self.chat._current = None
            self.answer.close()

    @property
    def result(self) -> GenerationResult:
        return self.answer.result
