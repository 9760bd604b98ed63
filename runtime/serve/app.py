"""The HTTP server: OpenAI's API over the models of a pool, and a page to chat in."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any

from fastapi import FastAPI, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemma3n_onnx.runtime.errors import (
    ArtifactError,
    ContextLengthError,
    Gemma3nError,
    PackageMissingError,
    ProviderError,
)
from gemma3n_onnx.runtime.generation.scheduler import DeadlineError

from .answers import (
    CHAT,
    COMPLETION,
    Answering,
    Kind,
    StreamChunks,
    Work,
    collect,
    envelope,
    error_body,
    read_chat,
    usage,
)
from .metrics import Metrics
from .model_pool import ModelPool, Served, UnknownModelError
from .protocol import ChatRequest, CompletionRequest, Sampling
from .worker import BusyError

log = logging.getLogger(__name__)

TRANSCRIBE = "Transcribe the speech."
TRANSCRIBE_IN = "Transcribe the speech, which is in the language {language}."
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Limits:
    """`body_bytes` of one request, `seconds` that it may take, and how many may be `reading` media at once."""

    body_bytes: int = 64 << 20
    seconds: float = 600.0
    reading: int = 8


def create_app(pool: ModelPool, limits: Limits, api_key: str | None = None) -> FastAPI:
    """`api_key`: what clients must send as a bearer token to /v1; None for anyone."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(pool.close)

    app = FastAPI(title="gemma3n-onnx", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Body, limit=limits.body_bytes)
    app.add_middleware(_Key, key=api_key)
    metrics = Metrics(pool)
    service = _Service(pool, limits, metrics)
    _answer_errors(app)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "loaded": [*pool.loaded]}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def measured() -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(pool, name) for name in pool.folders]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        if name not in pool.folders:
            raise UnknownModelError(f"There is no model {name!r}; there are {', '.join(pool.folders)}.")
        return _model(pool, name)

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest, http: Request) -> Response:
        return await service.complete(CHAT, request, http)

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, http: Request) -> Response:
        return await service.complete(COMPLETION, request, http)

    @app.post("/v1/audio/transcriptions")
    async def transcriptions(
        http: Request,
        file: UploadFile,
        model: Annotated[str, Form()],
        language: Annotated[str | None, Form()] = None,
        prompt: Annotated[str | None, Form()] = None,
        response_format: Annotated[str, Form()] = "json",
        temperature: Annotated[float, Form()] = 0.0,
    ) -> Response:
        if response_format not in ("json", "text"):
            raise HTTPException(400, f"response_format is {response_format!r}; choose json or text.")
        ask = prompt or (TRANSCRIBE if language is None else TRANSCRIBE_IN.format(language=language))
        content = [{"type": "audio", "audio": await file.read()}, {"type": "text", "text": ask}]
        request = ChatRequest(
            model=model,
            messages=[{"role": "user", "content": content}],
            temperature=temperature,
            long_audio="split",
        )
        async with service.held(model) as served:
            (choice,) = await service.answer(await service.read(read_chat, request, served), served, http)
        return PlainTextResponse(choice.text) if response_format == "text" else JSONResponse({"text": choice.text})

    return app


class _Service:
    """Shared by the routes: acquires models for the duration of a request, and enforces its time limit."""

    def __init__(self, pool: ModelPool, limits: Limits, metrics: Metrics) -> None:
        self._pool, self._limits, self._metrics = pool, limits, metrics
        self._reading = asyncio.Semaphore(limits.reading)

    @asynccontextmanager
    async def held(self, name: str) -> AsyncIterator[Served]:
        """A stream outlives this context and retains the model itself."""
        served = await asyncio.to_thread(self._pool.acquire, name)
        try:
            yield served
        finally:
            self._pool.release(served)

    async def complete(self, kind: Kind, request: Sampling, http: Request) -> Response:
        """An answer of either kind, whole or streamed."""
        async with self.held(request.model) as served:
            work = await self.read(kind.read, request, served)
            if request.stream:
                with_usage = bool(request.stream_options and request.stream_options.include_usage)
                return self.stream(work, served, kind.stream(work, served, with_usage=with_usage))
            choices = await self.answer(work, served, http)
        listed = [kind.choice(i, choice, work, served) for i, choice in enumerate(choices)]
        body = {**envelope(kind.object, kind.prefix, served.name), "choices": listed}
        return JSONResponse({**body, "usage": usage(choices, work.n)})

    async def read(self, reader: Callable[[Any, Served], Work], request: Any, served: Served) -> Work:
        async with self._reading:
            return await asyncio.to_thread(reader, request, served)

    async def answer(self, work: Work, served: Served, http: Request) -> list[Any]:
        """The complete answer; cancelled when the client disconnects."""
        answering = self._begin(work, served)
        collecting = asyncio.ensure_future(collect(answering))
        try:
            while not collecting.done():
                await asyncio.wait([collecting], timeout=_POLL_SECONDS)
                if not collecting.done() and await http.is_disconnected():
                    raise HTTPException(499, "The client has gone.")
            return collecting.result()
        except Gemma3nError as error:
            self._metrics.failed(error)
            raise
        finally:
            collecting.cancel()
            answering.cancel()

    def stream(self, work: Work, served: Served, chunks: StreamChunks) -> Response:
        answering = self._begin(work, served)
        self._pool.retain(served)

        async def lines() -> AsyncIterator[str]:
            try:
                for chunk in chunks.first():
                    yield _sse(chunk)
                async for index, event in answering.events():
                    for chunk in chunks.next(index, event):
                        yield _sse(chunk)
                for chunk in chunks.usage():
                    yield _sse(chunk)
                yield "data: [DONE]\n\n"
            except Gemma3nError as error:
                self._metrics.failed(error)
                yield _sse(_shape(error)[1])

        def done() -> None:
            answering.cancel()
            self._pool.release(served)

        return _Stream(lines(), done)

    def _begin(self, work: Work, served: Served) -> Answering:
        return Answering(work, served, time.monotonic() + self._limits.seconds, self._metrics.first_token)


class _Stream(StreamingResponse):
    """Server-sent events; `done` is always called, even if the stream never starts."""

    def __init__(self, lines: AsyncIterator[str], done: Callable[[], None]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()


def _sse(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _model(pool: ModelPool, name: str) -> dict[str, Any]:
    manifest = pool.manifests[name]
    return {
        "id": name,
        "object": "model",
        "created": pool.started,
        "owned_by": "gemma3n-onnx",
        "slice": manifest.slice,
        "precision": manifest.precision,
        "modalities": [*manifest.modalities],
    }


def _shape(error: Gemma3nError) -> tuple[int, dict[str, Any]]:
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


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(Gemma3nError)
    async def of_ours(_: Request, error: Gemma3nError) -> JSONResponse:
        status, body = _shape(error)
        return JSONResponse(body, status, headers={"Retry-After": "1"} if status == 429 else None)

    @app.exception_handler(RequestValidationError)
    async def of_form(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part != "body")
        body = error_body(f"{field or 'The body'}: {first['msg']}.", "invalid_request_error")
        body["error"]["param"] = field or None
        return JSONResponse(body, 400)

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        told = {404: f"There is no {request.url.path} here.", 405: f"{request.url.path} takes no {request.method}."}
        message = told.get(error.status_code, error.detail)
        return JSONResponse(error_body(message, "invalid_request_error"), error.status_code)

    @app.exception_handler(Exception)
    async def of_none(_: Request, error: Exception) -> JSONResponse:
        log.error("a request failed", exc_info=error)
        return JSONResponse(error_body("The server failed in this request; its log says why.", "server_error"), 500)


class _Key:
    """Refuses /v1 without the key."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app, self._key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._may_pass(scope):
            await self._app(scope, receive, send)
            return
        body = error_body("The API key is missing or wrong.", "authentication_error", "invalid_api_key")
        await JSONResponse(body, 401)(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        if scope["type"] != "http" or self._key is None or not scope["path"].startswith("/v1/"):
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, b"Bearer " + self._key.encode())


class _TooLargeError(Exception):
    """The request body exceeds the limit."""


class _Body:
    """Refuses bodies over the limit, before reading them if Content-Length says so."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        received, started = 0, False

        async def counting() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise _TooLargeError
            return message

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            if not length.isdigit() or int(length) > self._limit:
                raise _TooLargeError
            await self._app(scope, counting, sending)
        except _TooLargeError:
            if started:
                raise
            message = f"The body is larger than {self._limit:,} bytes; send smaller media."
            await JSONResponse(error_body(message, "invalid_request_error"), 413)(scope, receive, send)
