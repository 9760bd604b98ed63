"""Fields that requests of several endpoints share: OpenAI's, and those of llama.cpp, vLLM, LM Studio and Ollama that
have a meaning here.

Null is absence. Fields that cannot change an answer of this server are ignored; other unknown ones are refused.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator

from gemma3n_onnx.runtime.errors import ContextLengthError, OptionError
from gemma3n_onnx.runtime.generation.defaults import SamplingDefaults
from gemma3n_onnx.runtime.generation.options import GenerationOptions
from gemma3n_onnx.runtime.serve.json_body import strings_in
from gemma3n_onnx.runtime.serve.model_pool import Served
from gemma3n_onnx.runtime.tokens import PromptTokens

IGNORED = {
    *("metadata", "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "reasoning"),
    *("max_tool_calls",),  # of tools that OpenAI runs itself
    *("reasoning_effort", "safety_identifier", "service_tier", "store", "user", "verbosity"),  # OpenAI
    *("cache_prompt", "id_slot", "reasoning_format", "return_progress", "slot_id", "timings_per_token"),  # llama.cpp
    *("cache_salt", "include_reasoning", "priority", "request_id"),  # vLLM
    *("keep_alive", "think", "thinking", "ttl"),  # Ollama, LM Studio
    *("cache_control", "context_management", "diagnostics", "inference_geo", "speed"),  # Anthropic
}
# Fields that would change the answer, and the values at which they do not.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "bad_words": ([],),
    "best_of": (1,),
    "context_length_exceeded_behavior": ("error",),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "echo": (False,),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "mcp_servers": ([],),
    "min_tokens": (0,),
    "mirostat": (0,),
    "modalities": (["text"],),
    "n_probs": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "suffix": ("",),
    "tfs_z": (1,),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "xtc_probability": (0,),
}
SAME = {"n_predict": "max_tokens", "num_predict": "max_tokens", "repeat_penalty": "repetition_penalty"}


MAX_MESSAGES = 4096
MAX_TOOLS = 512
MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 512
MAX_TOKEN_IDS = 1024  # of stop_token_ids and logit_bias


class _FirstFault(FailFast):
    __hash__ = object.__hash__  # a member of a union has to have one


_Item = TypeVar("_Item")
Items = Annotated[list[_Item], _FirstFault()]
"""Validation ends at the first wrong item: an error takes a hundred times the memory of the item."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _require_few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_TOKEN_IDS:
        raise ValueError(f"the object has {len(value):,} token ids, and this server takes {MAX_TOKEN_IDS:,}")
    return value


Messages = Annotated[Items[dict[str, Any]], Field(max_length=MAX_MESSAGES)]
_StopString = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]
StopStrings = Annotated[Items[_StopString], Field(max_length=MAX_STOP_STRINGS), BeforeValidator(_as_list)]


class ApiModel(BaseModel):
    """Null is absence; unknown fields are refused, the first one by name."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = cls._fields({name: value for name, value in data.items() if value is not None})
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = {*[name for name in fields if name not in known][1:]}
        return {name: value for name, value in fields.items() if name not in unknown}

    @classmethod
    def _fields(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The fields to validate of those `given`. Raises ValueError for one that is not supported."""
        return given

    @property
    def has_media(self) -> bool:
        """Whether it holds images, sound or videos."""
        return False


class ApiRequest(ApiModel):
    model: str = ""

    @classmethod
    def _fields(cls, given: dict[str, Any]) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for name, value in given.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in SAME and SAME[name] in cls.model_fields:
                kept.setdefault(SAME[name], value)
            elif name in NEUTRAL and value not in NEUTRAL[name]:
                allowed = " or ".join(map(repr, NEUTRAL[name]))
                raise ValueError(f"{name} is {reprlib.repr(value)}, and this server supports only {allowed}")
            elif name not in IGNORED and name not in NEUTRAL:
                kept[name] = value
        return kept


class StreamOptions(ApiModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


SAMPLING = tuple(SamplingDefaults.__dataclass_fields__)


class SamplingRequest(ApiRequest):
    """Fields of both kinds of completion; `GenerationOptions` checks their ranges. The sampling fields that a request
    does not have are the server's, see `Served.sampling`."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: Annotated[int, Field(ge=1, le=16)] = 1
    stop: StopStrings = Field(default_factory=list)
    stop_token_ids: Annotated[Items[int], Field(max_length=MAX_TOKEN_IDS)] = Field(default_factory=list)
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[int, float], BeforeValidator(_require_few)] | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


def generation_options(
    request: SamplingRequest,
    served: Served,
    prompts: Sequence[PromptTokens],
    max_tokens: int | None,
    logprobs: int | None,
) -> GenerationOptions:
    """Options of a request. -1 stands for no limit, 0 for none of `top_k` and greedy decoding by `top_p`.

    Raises:
        OptionError: a field is out of its range.
    """
    largest = served.model.manifest.vocab_size - 1
    for name, ids in (("logit_bias", [*(request.logit_bias or ())]), ("stop_token_ids", request.stop_token_ids)):
        if ids and max(ids) > largest:
            raise OptionError(f"{name} names the token {max(ids)}; the largest id is {largest}.")
    given = {name: getattr(request, name) for name in SAMPLING if getattr(request, name) is not None}
    if given.get("top_k") in (0, -1):
        given["top_k"] = None
    if given.get("top_p") == 0:
        given |= {"temperature": 0.0, "top_p": None}
    return GenerationOptions(
        **served.sampling.under(given),
        max_new_tokens=new_tokens(served, prompts, max_tokens),
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        stop=tuple(text for text in request.stop if text),
        stop_token_ids=tuple(request.stop_token_ids),
        seed=None if request.seed == -1 else request.seed,
        logprobs=logprobs,
        logit_bias=request.logit_bias,
    )


def require_room(served: Served, *texts: Any) -> None:
    """`texts`: JSON values whose strings become part of one prompt.

    Raises:
        ContextLengthError: they have more characters than any tokens that fit into the context. Tokenizing them would
        take 200 bytes of memory for each character.
    """
    most = served.worker.context * served.model.tokenizer.longest_token
    if (length := sum(map(len, strings_in([*texts])))) > most:
        raise ContextLengthError(
            f"The texts have {length:,} characters, and the context of {served.worker.context:,} tokens never takes "
            f"more than {most:,}; shorten them."
        )


def new_tokens(served: Served, prompts: Sequence[PromptTokens], max_tokens: int | None) -> int:
    """Tokens that an answer may have: `max_tokens`, or what is left of the context after the longest prompt if that is
    less. None and -1 stand for no limit but the context."""
    room = max(served.worker.context - max(map(len, prompts)), 1)
    if max_tokens is None or max_tokens == -1:
        return room
    return min(max_tokens, room) if served.options.clamp_max_tokens else max_tokens
