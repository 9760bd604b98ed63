"""The HTTP application: OpenAI's API over the models of a pool, and a page to chat in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse, Response

from . import page
from .anthropic import messages
from .errors import handle_errors
from .json_body import JsonRoute
from .middleware import (
    AnswerBugs,
    EndUnanswered,
    Lenient,
    LimitBody,
    RequireHost,
    RequireKey,
    RequireOrigin,
    Unanswered,
)
from .model_pool import ModelPool
from .openai import chat, completions, embeddings, models, responses, tokenize, transcriptions
from .service import Limits, Service

ENDPOINTS = (models, chat, completions, responses, messages, transcriptions, tokenize, embeddings)


@dataclass(frozen=True)
class Access:
    """Who may send requests.

    Attributes:
        api_key: what clients must send; None for anyone.
        origins: of web pages that may use the server (CORS), beside its own; "*" for any.
        hosts: values of the Host header that are taken; None for any.
    """

    api_key: str | None = None
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None


def create_app(pool: ModelPool, limits: Limits, access: Access | None = None) -> FastAPI:
    """`app.state.end()` ends every running answer, with an error in the form of its API."""
    access = access or Access()
    service, unanswered = Service(pool, limits), Unanswered()

    async def end() -> None:
        unanswered.end()
        await service.close()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await end()

    app = FastAPI(title="gemma3n-onnx", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.end = end
    # The last one added is the first that a request meets.
    app.add_middleware(LimitBody, limit=limits.body_bytes)
    app.add_middleware(RequireKey, key=access.api_key)
    app.add_middleware(Lenient)
    app.add_middleware(RequireOrigin, origins=access.origins)
    app.add_middleware(EndUnanswered, unanswered=unanswered)
    app.add_middleware(AnswerBugs)
    if access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[*access.origins],
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
            max_age=600,
        )
    app.add_middleware(RequireHost, hosts=access.hosts)
    app.router.route_class = JsonRoute
    handle_errors(app)
    for endpoint in ENDPOINTS:
        endpoint.add_routes(app, service)
    page.add_routes(app)

    @app.get("/health")
    @app.get("/healthz")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "loaded": [*pool.loaded]}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    return app
