"""POST /tokenize and /detokenize, in the forms of llama.cpp and vLLM."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from pydantic import ConfigDict

from gemma3n_onnx.runtime.errors import OptionError, PromptError
from gemma3n_onnx.runtime.prompt.encoder import TemplateOptions
from gemma3n_onnx.runtime.prompt.messages import sources_of, without_media
from gemma3n_onnx.runtime.serve.model_pool import Served
from gemma3n_onnx.runtime.serve.service import Service

from .requests import ApiModel, Items, Messages, require_room


class TokenizeRequest(ApiModel):
    """`content` and `add_special` are llama.cpp's, `prompt`, `messages` and `add_special_tokens` vLLM's."""

    model_config = ConfigDict(extra="ignore")

    model: str = ""
    content: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    with_pieces: bool = False

    @property
    def has_media(self) -> bool:
        return bool(sources_of(self.messages or []))


class DetokenizeRequest(ApiModel):
    model_config = ConfigDict(extra="ignore")

    model: str = ""
    tokens: Items[int]


def add_routes(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(request: TokenizeRequest, http: HttpRequest) -> dict[str, Any]:
        async with service.held(request.model) as served:
            tokens = await service.read(_tokens, request, served, http)
            limit = served.worker.context
        return {"tokens": tokens, "count": len(tokens), "max_model_len": limit}

    @app.post("/detokenize")
    async def detokenize(request: DetokenizeRequest, http: HttpRequest) -> dict[str, str]:
        async with service.held(request.model) as served:
            text = await service.read(_text, request, served, http)
        return {"content": text, "prompt": text}


def _tokens(request: TokenizeRequest, served: Served) -> list[Any]:
    ids, tokenizer = _ids(request, served), served.model.tokenizer
    if not request.with_pieces:
        return list(ids)
    return [{"id": token, "piece": tokenizer.decode([token], skip_special=False)} for token in ids]


def _text(request: DetokenizeRequest, served: Served) -> str:
    size = served.model.tokenizer.vocab_size
    if unknown := [token for token in request.tokens if not 0 <= token < size]:
        raise OptionError(f"{unknown[0]} is not a token id from 0 to {size - 1}.")
    return served.model.tokenizer.decode(request.tokens, skip_special=False)


def _ids(request: TokenizeRequest, served: Served) -> list[int]:
    require_room(served, request.content, request.prompt, without_media(request.messages or []))
    if request.messages is not None:
        options = TemplateOptions(control_tokens=served.options.control_tokens)
        return served.model.encode(request.messages, template=options).ids
    text = request.content if request.prompt is None else request.prompt
    if text is None:
        raise PromptError("There is nothing to tokenize; send content, prompt or messages.")
    # llama.cpp adds no <bos> by default, and vLLM does.
    default = request.prompt is not None
    wanted = [flag for flag in (request.add_special, request.add_special_tokens) if flag is not None]
    return served.model.tokenizer.encode(text, add_bos=wanted[0] if wanted else default)
