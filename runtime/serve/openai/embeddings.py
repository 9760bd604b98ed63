"""POST /v1/embeddings, which Gemma 3n cannot answer."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from gemma3n_onnx.runtime.serve.service import Service


def add_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/embeddings")
    async def embeddings() -> None:
        raise HTTPException(400, "Gemma 3n generates text and gives no embeddings; use an embedding model for them.")
