"""Errors as HTTP answers, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from gemma3n_onnx.runtime.errors import (
    AnswerSchemaError,
    ArtifactError,
    ContextLengthError,
    DeadlineError,
    Gemma3nError,
    PackageMissingError,
    ProviderError,
    as_flag,
)

from .not_found import NotFoundError, UnknownModelError
from .validation import describe_validation, known_fields
from .worker import BusyError, ShutdownError

_MESSAGE = 1000  # characters; a message may quote what the client sent
ANTHROPIC_TYPES = {"server_error": "api_error", "model_not_found": "not_found_error"}


def error_body(
    error: Gemma3nError | str, kind: str, code: str | None = None, max_tokens: str = "max_tokens"
) -> dict[str, Any]:
    """`max_tokens`: the request's field for `max_new_tokens`."""
    message, field = str(error), None
    if isinstance(error, Gemma3nError) and error.option is not None:
        field = max_tokens if error.option == "max_new_tokens" else error.option
        field = field if field in known_fields() else None
        message = error.spelled(as_flag if field is None else lambda _, value: f'{field} "{value}"' if value else field)
    message = message if len(message) <= _MESSAGE else f"{message[: _MESSAGE - 1]}…"
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def status_and_body(error: Gemma3nError, max_tokens: str = "max_tokens") -> tuple[int, dict[str, Any]]:
    """`max_tokens` as of `error_body`."""
    match error:
        case UnknownModelError():
            return 404, error_body(error, "invalid_request_error", "model_not_found")
        case NotFoundError():
            return 404, error_body(error, "invalid_request_error", "not_found")
        case AnswerSchemaError():
            return 422, error_body(error, "invalid_response_error", "answer_breaks_schema")
        case ContextLengthError():
            return 400, error_body(error, "invalid_request_error", "context_length_exceeded", max_tokens)
        case BusyError():
            return 429, error_body(error, "rate_limit_error", "rate_limit_exceeded")
        case ShutdownError():
            return 503, error_body(error, "server_error", "shutting_down")
        case DeadlineError():
            return 504, error_body(error, "timeout_error", "deadline_exceeded")
        case ArtifactError():
            return 503, error_body(error, "server_error", "model_unavailable")
        case ProviderError() | PackageMissingError():
            return 500, error_body(error, "server_error")
        case _:
            return 400, error_body(error, "invalid_request_error", max_tokens=max_tokens)


def name_max_tokens(request: Request, field: str) -> None:
    """Says which field of this request stands for `max_new_tokens`, for errors about it."""
    request.state.max_tokens = field


def anthropic_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """An error in Anthropic's form."""
    told = body["error"]
    kind = ANTHROPIC_TYPES.get(told["code"]) or ANTHROPIC_TYPES.get(told["type"], told["type"])
    return {"type": "error", "error": {"type": kind, "message": told["message"]}}


def body_for(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """An error in the form of the API that the path belongs to."""
    return anthropic_body(body) if path.startswith("/v1/messages") else body


def handle_errors(app: FastAPI) -> None:
    """Adds the exception handlers to an application."""

    def answer(request: Request, status: int, body: dict[str, Any]) -> JSONResponse:
        headers = {"Retry-After": "1"} if status == 429 else None
        return JSONResponse(body_for(request.url.path, body), status, headers)

    @app.exception_handler(Gemma3nError)
    async def of_ours(request: Request, error: Gemma3nError) -> JSONResponse:
        return answer(request, *status_and_body(error, getattr(request.state, "max_tokens", "max_tokens")))

    @app.exception_handler(UnicodeEncodeError)
    async def of_text(request: Request, _: UnicodeEncodeError) -> JSONResponse:
        message = "The request contains a lone surrogate; send valid Unicode."
        return answer(request, 400, error_body(message, "invalid_request_error"))

    @app.exception_handler(ValidationError)
    @app.exception_handler(RequestValidationError)
    async def of_validation(request: Request, error: ValidationError | RequestValidationError) -> JSONResponse:
        message, field = describe_validation(error.errors())
        body = error_body(message, "invalid_request_error")
        body["error"]["param"] = field or None
        return answer(request, 400, body)

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        known = {
            404: f"This server has no endpoint {request.url.path}.",
            405: f"{request.url.path} does not accept {request.method}.",
        }
        message = known.get(error.status_code, error.detail)
        return answer(request, error.status_code, error_body(message, "invalid_request_error"))
