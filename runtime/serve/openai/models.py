"""GET /v1/models, and POST /v1/models/NAME/unload."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Body, FastAPI

from gemma3n_onnx.runtime.serve.model_pool import ModelPool
from gemma3n_onnx.runtime.serve.service import Service


def add_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service.pool, name) for name in service.pool.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return _model(service.pool, name)

    @app.post("/v1/models/{name:path}/unload")
    async def unload(name: str, encoders: Annotated[bool, Body(embed=True)] = False) -> dict[str, Any]:
        """Frees a model that no request uses, or with `encoders` only its image and audio encoders."""
        freed = await service.unload(name, encoders=encoders)
        return {"id": name, "object": "model", "unloaded": freed}


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
        "max_model_len": pool.context_of(name),
    }
