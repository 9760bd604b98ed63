"""POST /v1/audio/transcriptions: a question about the file, put to the model."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Form, UploadFile
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from gemma3n_onnx.runtime.serve.service import Service

from .chat import ChatRequest, read_chat

TRANSCRIBE = "Transcribe the speech."
TRANSCRIBE_IN = "Transcribe the speech, which is in the language {language}."


def add_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/audio/transcriptions")
    async def transcriptions(
        http: HttpRequest,
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
