"""GET /v1/models."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from gemma3n_onnx.runtime.serve.model_pool import ModelPool
from gemma3n_onnx.runtime.serve.service import Service


def add_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service.pool, name) for name in service.pool.folders]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        return _model(service.pool, name)


def _model(pool: ModelPool, name: str) -> dict[str, Any]:
    manifest = pool.manifest(name)
    return {
        "id": name,
        "object": "model",
        "created": pool.started,
        "owned_by": "gemma3n-onnx",
        "slice": manifest.slice,
        "precision": manifest.precision,
        "modalities": [*manifest.modalities],
    }
