"""POST /v1/audio/transcriptions and /v1/audio/translations: an instruction to the model about each clip of a file."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import Field
from starlette.datastructures import UploadFile

from gemma3n_onnx.runtime.errors import OptionError
from gemma3n_onnx.runtime.generation.options import GenerationOptions
from gemma3n_onnx.runtime.media.reader import Item, MediaOptions
from gemma3n_onnx.runtime.prompt.encoder import TemplateOptions
from gemma3n_onnx.runtime.serve.answering import Choice, ParsedRequest
from gemma3n_onnx.runtime.serve.model_pool import Served
from gemma3n_onnx.runtime.serve.service import Service
from gemma3n_onnx.runtime.serve.worker import BusyError

from .completion import usage
from .requests import ApiRequest, Items, new_tokens, require_room

WAIT_SECONDS = 0.5  # between attempts to queue the next clip of a file
TRANSCRIBE = "Transcribe the speech."
TRANSCRIBE_IN = "Transcribe the speech, which is in the language {language}."
TRANSLATE = "Translate the speech into English."


class TranscriptionRequest(ApiRequest):
    """Fields of the form beside `file`. `prompt` takes the place of the instruction."""

    language: str | None = None
    prompt: str | None = None
    response_format: Literal["json", "text", "verbose_json", "srt", "vtt"] = "json"
    temperature: float = 0.0
    stream: bool = False
    chunking_strategy: Literal["auto"] | None = None
    timestamp_granularities: Items[Literal["segment"]] = Field(default_factory=list)

    @property
    def has_media(self) -> bool:
        return True


@dataclass(frozen=True)
class Segment:
    """What was said between two times, in seconds; `choice` is the answer that says it."""

    start: float
    end: float
    text: str
    choice: Choice


@dataclass(frozen=True)
class ParsedFile(ParsedRequest):
    """A prompt for each clip of a file. `seconds`: where the clips begin, and where the last one ends."""

    seconds: Sequence[float] = ()


def add_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/audio/transcriptions")
    async def transcriptions(http: HttpRequest) -> Response:
        request, data = await _read_form(http)
        spoken = TRANSCRIBE if request.language is None else TRANSCRIBE_IN.format(language=request.language)
        return await _answer("transcribe", spoken, request, data, service, http)

    @app.post("/v1/audio/translations")
    async def translations(http: HttpRequest) -> Response:
        request, data = await _read_form(http)
        return await _answer("translate", TRANSLATE, request, data, service, http)


async def _read_form(http: HttpRequest) -> tuple[TranscriptionRequest, bytes]:
    async with http.form() as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise OptionError("The form needs a file; send it as multipart/form-data in the field file.")
        fields: dict[str, Any] = {key: value for key, value in form.items() if key != "file" and not key.endswith("[]")}
        fields |= {key[:-2]: form.getlist(key) for key in form if key.endswith("[]")}
        return TranscriptionRequest.model_validate(fields), await file.read()


async def _answer(
    task: str, instruction: str, request: TranscriptionRequest, data: bytes, service: Service, http: HttpRequest
) -> Response:
    async with service.held(request.model) as served:
        parsed = await service.read(lambda _, model: _parse(request, data, instruction, model), request, served, http)
        if request.stream:
            return service.stream_events(_events(parsed, served, service, http), served)
        segments = [each async for each in _segments(parsed, served, service, http, served.options.rows)]
    return _formatted(task, request, segments, {"usage": _usage(segments, parsed), **parsed.warnings})


def _parse(request: TranscriptionRequest, data: bytes, instruction: str, served: Served) -> ParsedFile:
    """Cuts a file into clips. Raises Gemma3nError: what is wrong with it."""
    require_room(served, request.prompt or instruction)
    ask = {"type": "text", "text": request.prompt or instruction}
    file = [{"role": "user", "content": [{"type": "audio", "audio": data}]}]
    items: list[Item] = [
        part["audio"] for part in served.model.read(file, MediaOptions(long_audio="split"))[0]["content"]
    ]
    template = TemplateOptions(control_tokens=served.options.control_tokens)
    messages = [[{"role": "user", "content": [{"type": "audio", "audio": item}, ask]}] for item in items]
    prompts = [served.model.encode(message, template=template) for message in messages]
    seconds = [0.0]
    for item in items:
        seconds.append(seconds[-1] + item.seconds)
    room, scored = new_tokens(served, prompts, None), request.response_format == "verbose_json"
    options = GenerationOptions(max_new_tokens=room, temperature=request.temperature, logprobs=0 if scored else None)
    return ParsedFile(prompts, options, seconds=seconds)


async def _segments(
    parsed: ParsedFile, served: Served, service: Service, http: HttpRequest, at_once: int
) -> AsyncIterator[Segment]:
    """Answers a few clips at a time, so that a long file leaves room in the queue; one deadline holds for all."""
    deadline = service.deadline(http)
    for start in range(0, len(parsed.prompts), at_once):
        part = replace(parsed, prompts=parsed.prompts[start : start + at_once])
        while True:
            try:
                choices = await service.answer(part, served, http)
                break
            except BusyError:
                if start == 0 or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(WAIT_SECONDS)
        for number, choice in enumerate(choices, start):
            yield Segment(parsed.seconds[number], parsed.seconds[number + 1], choice.text.strip(), choice)


async def _events(
    parsed: ParsedFile, served: Served, service: Service, http: HttpRequest
) -> AsyncIterator[Mapping[str, Any]]:
    """OpenAI's events: a delta for each clip."""
    segments: list[Segment] = []
    async for segment in _segments(parsed, served, service, http, 1):
        segments.append(segment)
        yield {"type": "transcript.text.delta", "delta": segment.text if len(segments) == 1 else f" {segment.text}"}
    ended = {"type": "transcript.text.done", "text": _text_of(segments), "usage": _usage(segments, parsed)}
    yield ended | parsed.warnings


def _text_of(segments: Sequence[Segment]) -> str:
    return " ".join(segment.text for segment in segments)


def _usage(segments: Sequence[Segment], parsed: ParsedFile) -> dict[str, Any]:
    counted = usage([segment.choice for segment in segments], parsed)
    return {
        "type": "tokens",
        "input_tokens": counted["prompt_tokens"],
        "output_tokens": counted["completion_tokens"],
        "total_tokens": counted["total_tokens"],
    }


def _formatted(
    task: str, request: TranscriptionRequest, segments: Sequence[Segment], rest: Mapping[str, Any]
) -> Response:
    """`rest`: further fields of a JSON body."""
    text = _text_of(segments)
    match request.response_format:
        case "text":
            return PlainTextResponse(text)
        case "srt":
            return PlainTextResponse("".join(map(_srt, range(1, len(segments) + 1), segments)))
        case "vtt":
            return PlainTextResponse("WEBVTT\n\n" + "".join(map(_vtt, segments)), media_type="text/vtt")
        case "verbose_json":
            listed = [_verbose(number, segment, request.temperature) for number, segment in enumerate(segments)]
            whole = {"task": task, "language": request.language, "duration": segments[-1].end}
            return JSONResponse({**whole, "text": text, "segments": listed, **rest})
    return JSONResponse({"text": text, **rest})


def _verbose(number: int, segment: Segment, temperature: float) -> dict[str, Any]:
    """All fields of OpenAI's segments, which clients require; whether there is speech is not estimated."""
    logprobs = [token.logprob for token in segment.choice.logprobs]
    spelled = segment.text.encode()
    return {
        "id": number,
        "seek": round(segment.start * 100),
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "tokens": [token.token_id for token in segment.choice.logprobs],
        "temperature": temperature,
        "avg_logprob": sum(logprobs) / max(len(logprobs), 1),
        "compression_ratio": len(spelled) / len(zlib.compress(spelled)) if spelled else 0.0,
        "no_speech_prob": 0.0,
    }


def _srt(number: int, segment: Segment) -> str:
    return f"{number}\n{_time(segment.start, ',')} --> {_time(segment.end, ',')}\n{segment.text}\n\n"


def _vtt(segment: Segment) -> str:
    return f"{_time(segment.start, '.')} --> {_time(segment.end, '.')}\n{segment.text}\n\n"


def _time(seconds: float, point: str) -> str:
    """Hours, minutes, seconds and milliseconds."""
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    whole, fraction = divmod(rest, 1000)
    return f"{hours:02}:{minutes:02}:{whole:02}{point}{fraction:03}"
