"""A conversation that keeps its KV cache: each turn runs only what the cache does not hold yet."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .engine.kv_cache import KVCache
from .errors import OptionError, PromptError
from .generation.answer import Answer, GenerationResult, read_options
from .tokens import PromptTokens

if TYPE_CHECKING:
    from .model import OnnxGemma3n


class Chat:
    """Made by `OnnxGemma3n.chat`. `messages` is the conversation so far, its media as they were read.

    The model's own tokens stay in the cache as they were made; text is tokenized once.
    """

    def __init__(self, model: OnnxGemma3n, system: str | None) -> None:
        if model.template is None:
            raise PromptError("This artifact has no chat template, so it cannot chat; use generate.")
        if system is not None and not isinstance(system, str):
            raise OptionError(f"system is {system!r}; give the system prompt as text.")
        self._model = model
        self._system = system
        self.reset()

    def reset(self) -> None:
        """Forgets the conversation but the system prompt."""
        self.messages: list[dict[str, Any]] = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})
        self._cache: KVCache | None = None
        self._cached: list[Hashable] = []
        self._transcript: tuple[str, list[int]] | None = None
        self._current: Turn | None = None

    def send(self, content: str | Sequence[Mapping[str, Any]], **options: Any) -> GenerationResult:
        """The answer to the next user message, text or parts; options and errors as for `OnnxGemma3n.generate`."""
        turn = self.stream(content, **options)
        for _ in turn:
            pass
        return turn.result

    def stream(self, content: str | Sequence[Mapping[str, Any]], **options: Any) -> Turn:
        """The same as pieces of text; a turn that is not iterated to its end is forgotten.

        PromptError: while iterating, when the turn has ended, by itself or by the next one.
        """
        chosen, media = read_options(options)
        messages = self._model.read([*self.messages, {"role": "user", "content": content}], media)
        rendered = self._model.render(messages)
        prompt = self._model.locate(self._encode(rendered), messages)
        self._current = None
        kept = self._keep(prompt.keys())
        answer = Answer(
            self._model.engine,
            self._model.tokenizer,
            [prompt.after(kept)],
            chosen,
            self._ready_cache(),
            prompt.ids[:kept],
        )
        self._current = Turn(self, answer, [*self.messages, messages[-1]], rendered, prompt)
        return self._current

    def _encode(self, rendered: str) -> list[int]:
        """Ids of the whole conversation; the model's turns by the ids that it made."""
        tokenizer = self._model.tokenizer
        if self._transcript is not None:
            text, ids = self._transcript
            if rendered.startswith(text):
                return ids + tokenizer.encode(rendered[len(text) :], add_bos=False)
        return tokenizer.encode(rendered, add_bos=True)

    def _keep(self, keys: list[Hashable]) -> int:
        """Cuts the cache to what it shares with `keys`, short of the last one; returns how many tokens."""
        shared = 0
        for ours, theirs in zip(self._cached, keys[:-1]):
            if ours != theirs:
                break
            shared += 1
        if self._cache is not None and not self._cache.truncate(0, shared):
            self._cache.truncate(0, 0)
            shared = 0
        self._cached = self._cached[:shared]
        return shared

    def _ready_cache(self) -> KVCache:
        if self._cache is None:
            engine = self._model.engine
            self._cache = engine.new_cache(1, engine.manifest.max_context)
        return self._cache

    def _require_current(self, turn: Turn) -> None:
        """One cache serves one turn at a time."""
        if self._current is not turn:
            raise PromptError("This turn has ended, by itself or by the next one; send its message again.")

    def _record(self, turn: Turn) -> None:
        """A turn has ended: keeps its messages and what its tokens left in the cache."""
        result = turn.result
        assert self._cache is not None
        reply = result.text.strip()
        made = list(result.token_ids)
        self._cached = [*turn.prompt.keys(), *made][: int(self._cache.lengths[0])]
        spoken = made[:-1] if made[-1] in self._model.manifest.eos_token_ids else made
        whole = self._model.tokenizer.decode(spoken).strip() == reply
        self._transcript = (turn.rendered + reply, turn.prompt.ids + spoken) if whole else None
        self.messages = [*turn.messages, {"role": "assistant", "content": reply}]

    def _forget(self, turn: Turn) -> None:
        """A turn was broken off: what it put into the cache stays usable as a prefix."""
        assert self._cache is not None
        made = [*turn.prompt.keys(), *turn.answer.result.token_ids]
        self._cached = made[: int(self._cache.lengths[0])]


class Turn:
    """One answer of a chat as it is made."""

    def __init__(
        self, chat: Chat, answer: Answer, messages: list[dict[str, Any]], rendered: str, prompt: PromptTokens
    ) -> None:
        self.chat, self.answer, self.messages, self.rendered, self.prompt = chat, answer, messages, rendered, prompt

    def __iter__(self) -> Generator[str, None, None]:
        ended = False
        try:
            self.chat._require_current(self)
            for piece in self.answer:
                yield piece
                self.chat._require_current(self)
            ended = True
        finally:
            if self.chat._current is self:
                self.chat._current = None
                if ended:
                    self.chat._record(self)
                else:
                    self.chat._forget(self)

    @property
    def result(self) -> GenerationResult:
        return self.answer.result
