"""What a file of a request lacks is told in a field of the response, at every endpoint that takes media."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import pytest
from PIL import Image

from media import encoded
from serving import DEMO, E2B, SUM, message

SEEN = "A red circle, a yellow star and a blue square."
HEARD = "Three high beeps."
LACKS = "image 1: The end of the JPEG is missing, so the picture may be blank at the bottom."
CUT_OFF = "audio 1: The WAV is cut off: it declares"


@pytest.fixture(scope="module")
def picture() -> str:
    """The demo's picture as a JPEG without its last bytes, in base64."""
    jpeg = encoded(Image.open(DEMO / "picture.png").convert("RGB"), "JPEG", quality=95)
    return base64.b64encode(jpeg[: round(0.97 * len(jpeg))]).decode()


def post(server: Any, path: str, **body: Any) -> httpx.Response:
    response = httpx.post(f"{server.url}{path}", json={"model": E2B, "temperature": 0} | body, timeout=120)
    assert response.status_code == 200, response.text
    return response


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(each) for each in data if each != "[DONE]"]


def test_chat_completions(server: Any, picture: str) -> None:
    part = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}}
    asked = {"messages": message("What is in the picture?", part)}
    whole = post(server, "/v1/chat/completions", **asked).json()
    assert (whole["choices"][0]["message"]["content"], whole["warnings"]) == (SEEN, [LACKS])
    first, *rest = events_of(post(server, "/v1/chat/completions", stream=True, **asked))
    assert first["warnings"] == [LACKS] and not any("warnings" in chunk for chunk in rest)
    assert "warnings" not in post(server, "/v1/chat/completions", messages=message(SUM)).json()


def test_responses(server: Any, picture: str) -> None:
    content = [
        {"type": "input_image", "image_url": f"data:image/jpeg;base64,{picture}"},
        {"type": "input_text", "text": "What is in the picture?"},
    ]
    asked = {"input": [{"role": "user", "content": content}]}
    whole = post(server, "/v1/responses", **asked).json()
    assert (whole["output"][0]["content"][0]["text"], whole["warnings"]) == (SEEN, [LACKS])
    events = events_of(post(server, "/v1/responses", stream=True, **asked))
    assert events[0]["response"]["warnings"] == events[-1]["response"]["warnings"] == [LACKS]
    assert "warnings" not in post(server, "/v1/responses", input=SUM).json()


def test_anthropics_messages(server: Any, picture: str) -> None:
    source = {"type": "base64", "media_type": "image/jpeg", "data": picture}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What is in the picture?"}]
    asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 64}
    whole = post(server, "/v1/messages", **asked).json()
    assert (whole["content"][0]["text"], whole["warnings"]) == (SEEN, [LACKS])
    assert events_of(post(server, "/v1/messages", stream=True, **asked))[0]["message"]["warnings"] == [LACKS]


def test_transcriptions(server: Any) -> None:
    cut = (DEMO / "sound.wav").read_bytes()[:-2_000]
    form = {"model": E2B, "prompt": "What do you hear?"}

    def transcribe(data: bytes, **fields: str) -> httpx.Response:
        files = {"file": ("sound.wav", data)}
        return httpx.post(f"{server.url}/v1/audio/transcriptions", data=form | fields, files=files, timeout=120)

    for format in ("json", "verbose_json"):
        body = transcribe(cut, response_format=format).json()
        assert body["text"] == HEARD and body["warnings"][0].startswith(CUT_OFF)
    assert events_of(transcribe(cut, stream="true"))[-1]["warnings"][0].startswith(CUT_OFF)
    assert "warnings" not in transcribe((DEMO / "sound.wav").read_bytes()).json()


def test_documents_are_refused_by_name(server: Any) -> None:
    pdf = "data:application/pdf;base64," + base64.b64encode(b"%PDF-1.7\n").decode()
    chats = [
        message("What is it?", {"type": "file", "file": {"filename": "a.pdf", "file_data": pdf}}),
        message("What is it?", {"type": "image_url", "image_url": {"url": pdf}}),
    ]
    block = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}}
    requests = [
        *(("/v1/chat/completions", {"messages": messages}) for messages in chats),
        ("/v1/responses", {"input": message("What is it?", {"type": "input_file", "file_data": pdf})}),
        ("/v1/messages", {"messages": [{"role": "user", "content": [block]}], "max_tokens": 9}),
    ]
    for path, body in requests:
        response = httpx.post(server.url + path, json={"model": E2B} | body, timeout=60)
        told = response.json()["error"]["message"]
        print(told)
        assert response.status_code == 400 and "PDF" in told and "each page as an image" in told
