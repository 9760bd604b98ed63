"""Errors as HTTP answers, in OpenAI's form."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from gemma3n_onnx.runtime.errors import (
    ArtifactError,
    ContextLengthError,
    Gemma3nError,
    PackageMissingError,
    ProviderError,
)
from gemma3n_onnx.runtime.generation.scheduler import DeadlineError

from .model_pool import UnknownModelError
from .worker import BusyError

log = logging.getLogger(__name__)


def error_body(error: Gemma3nError | str, kind: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": str(error), "type": kind, "param": None, "code": code}}


def status_and_body(error: Gemma3nError) -> tuple[int, dict[str, Any]]:
    match error:
        case UnknownModelError():
            return 404, error_body(error, "invalid_request_error", "model_not_found")
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


def handle_errors(app: FastAPI) -> None:
    """Adds the exception handlers to an application."""

    @app.exception_handler(Gemma3nError)
    async def of_ours(_: Request, error: Gemma3nError) -> JSONResponse:
        status, body = status_and_body(error)
        return JSONResponse(body, status, headers={"Retry-After": "1"} if status == 429 else None)

    @app.exception_handler(RequestValidationError)
    async def of_validation(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part != "body")
        body = error_body(f"{field or 'The body'}: {first['msg']}.", "invalid_request_error")
        body["error"]["param"] = field or None
        return JSONResponse(body, 400)

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        known = {
            404: f"This server has no endpoint {request.url.path}.",
            405: f"{request.url.path} does not accept {request.method}.",
        }
        message = known.get(error.status_code, error.detail)
        return JSONResponse(error_body(message, "invalid_request_error"), error.status_code)

    @app.exception_handler(Exception)
    async def of_bug(_: Request, error: Exception) -> JSONResponse:
        log.error("a request failed", exc_info=error)
        return JSONResponse(error_body("The server failed on this request; see its log.", "server_error"), 500)
