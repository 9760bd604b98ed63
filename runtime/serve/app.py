"""The HTTP application: OpenAI's API over the models of a pool, and a page to chat in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, PlainTextResponse, Response

from .errors import handle_errors
from .middleware import LimitBody, RequireKey
from .model_pool import ModelPool
from .openai import chat, completions, models, transcriptions
from .service import Limits, Service

ENDPOINTS = (models, chat, completions, transcriptions)


def create_app(pool: ModelPool, limits: Limits, api_key: str | None = None) -> FastAPI:
    """`api_key`: what clients must send as a bearer token to /v1; None for anyone."""
    service = Service(pool, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(title="gemma3n-onnx", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(LimitBody, limit=limits.body_bytes)
    app.add_middleware(RequireKey, key=api_key)
    handle_errors(app)
    for endpoint in ENDPOINTS:
        endpoint.add_routes(app, service)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "loaded": [*pool.loaded]}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    return app
