"""Fields that requests of several endpoints share, with a few of this server's own.

Unknown fields that would change the answer are refused; fields without effect here are accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from gemma3n_onnx.runtime.errors import OptionError
from gemma3n_onnx.runtime.generation.options import GenerationOptions
from gemma3n_onnx.runtime.serve.model_pool import Served
from gemma3n_onnx.runtime.tokens import PromptTokens


class ApiRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str
    # OpenAI's own, without effect on an answer that this server could give.
    metadata: Any = None
    prediction: Any = None
    prompt_cache_key: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    user: Any = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class SamplingRequest(ApiRequest):
    """Fields of both kinds of completion; `GenerationOptions` checks their ranges."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: Annotated[int, Field(ge=1, le=16)] = 1
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None

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
    """`max_tokens` None allows as many tokens as fit into the context.

    Raises:
        OptionError: a field is out of its range.
    """
    largest = served.model.manifest.vocab_size - 1
    if request.logit_bias and max(request.logit_bias) > largest:
        raise OptionError(f"logit_bias names the token {max(request.logit_bias)}; the largest id is {largest}.")
    room = served.worker.context - max(map(len, prompts))
    stop = request.stop if request.stop is not None else ()
    return GenerationOptions(
        max_new_tokens=max(room, 1) if max_tokens is None else max_tokens,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        seed=request.seed,
        logprobs=logprobs,
        logit_bias=request.logit_bias,
    )
