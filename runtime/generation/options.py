"""Sampling and stopping options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gemma3n_onnx.runtime.checks import require_integer, require_real
from gemma3n_onnx.runtime.errors import OptionError

from .logits_processors import LogitsProcessor


@dataclass(frozen=True)
class GenerationOptions:
    """Sampling and stopping options; OptionError names a value that is out of range.

    temperature: 0 is greedy decoding, which ignores top_k, top_p, min_p and seed.
    top_k, top_p, min_p: None keeps every token.
    repetition_penalty: over prompt and generated tokens; 1 disables it.
    presence_penalty, frequency_penalty: over generated tokens only, once per token and once per
        occurrence; 0 disables them.
    stop: the text ends before the first of these strings; a single string is accepted.
    seed: None is a new random seed each time.
    logprobs: None reports none, 0 the chosen token's log-probability, N also those of the N most likely
        tokens.
    logit_bias: added to the logits of these tokens before anything else.
    logits_processor: factory of a per-sequence logits processor, such as a grammar.
    stop_token_ids: tokens that end the answer, beside the model's end tokens; the text leaves them out.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    logits_processor: Callable[[], LogitsProcessor] | None = None
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_integer("max_new_tokens", self.max_new_tokens, 1)
        require_real("temperature", self.temperature, lambda x: x >= 0, "of at least 0")
        if self.top_k is not None:
            require_integer("top_k", self.top_k, 1)
        if self.top_p is not None:
            require_real("top_p", self.top_p, lambda x: 0 < x <= 1, "above 0 and up to 1")
        if self.min_p is not None:
            require_real("min_p", self.min_p, lambda x: 0 <= x <= 1, "from 0 to 1")
        require_real("repetition_penalty", self.repetition_penalty, lambda x: x > 0, "above 0")
        require_real("presence_penalty", self.presence_penalty, lambda x: -2 <= x <= 2, "from -2 to 2")
        require_real("frequency_penalty", self.frequency_penalty, lambda x: -2 <= x <= 2, "from -2 to 2")
        if self.seed is not None:
            require_integer("seed", self.seed, 0, 2**64 - 1)
        if self.logprobs is not None:
            require_integer("logprobs", self.logprobs, 0, 20)
        for token, bias in (self.logit_bias or {}).items():
            require_integer("A token id of logit_bias", token, 0)
            require_real(f"logit_bias of token {token}", bias, lambda x: -100 <= x <= 100, "from -100 to 100")
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise OptionError(f"logits_processor must be callable, not {self.logits_processor!r}.")
        if not isinstance(self.stop_token_ids, (tuple, list)):
            message = f"stop_token_ids must be a list of token ids, not {self.stop_token_ids!r}."
            raise OptionError(message, option="stop_token_ids")
        for token in self.stop_token_ids:
            require_integer("A token id of stop_token_ids", token, 0)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(text, str) and text for text in stop):
            given = [*stop] if isinstance(stop, tuple) else self.stop
            raise OptionError(f"stop must be a non-empty string or a list of them, not {given!r}.", option="stop")
        object.__setattr__(self, "stop", tuple(stop))
