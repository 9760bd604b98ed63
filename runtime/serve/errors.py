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
    Gemma3nError,
    PackageMissingError,
    ProviderError,
)
from gemma3n_onnx.runtime.generation.scheduler import DeadlineError

from .worker import BusyError

ANTHROPIC_TYPES = {"server_error": "api_error", "model_not_found": "not_found_error"}


class NotFoundError(Gemma3nError, KeyError):
    """The server has no such thing."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError's is quoted


class UnknownModelError(NotFoundError):
    """The server offers no model of this name."""


def error_body(error: Gemma3nError | str, kind: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": str(error), "type": kind, "param": None, "code": code}}


def status_and_body(error: Gemma3nError) -> tuple[int, dict[str, Any]]:
    match error:
        case UnknownModelError():
            return 404, error_body(error, "invalid_request_error", "model_not_found")
        case NotFoundError():
            return 404, error_body(error, "invalid_request_error", "not_found")
        case AnswerSchemaError():
            return 422, error_body(error, "invalid_response_error", "answer_breaks_schema")
        case ContextLengthError():
            return 400, error_body(error, "invalid_request_error", "context_length_exceeded")
        case BusyError():
            return 429, error_body(error, "rate_limit_error", "rate_limit_exceeded")
        case DeadlineError():
            return 504, error_body(error, "timeout_error", "deadline_exceeded")
        case ProviderError() | ArtifactError() | PackageMissingError():
            return 500, error_body(error, "server_error")
        case _:
            return 400, error_body(error, "invalid_request_error")


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
        return answer(request, *status_and_body(error))

    @app.exception_handler(UnicodeEncodeError)
    async def of_text(request: Request, _: UnicodeEncodeError) -> JSONResponse:
        message = "The request contains a lone surrogate; send valid Unicode."
        return answer(request, 400, error_body(message, "invalid_request_error"))

    @app.exception_handler(ValidationError)
    @app.exception_handler(RequestValidationError)
    async def of_validation(request: Request, error: ValidationError | RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part != "body")
        reason = first["msg"].removeprefix("Value error, ")
        body = error_body(f"{field or 'The body'}: {reason}.", "invalid_request_error")
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
