"""Slow URLs and large media: what they delay, and what of them a request may hold."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from gemma3n_onnx.runtime.media.budget import MediaLimits
from gemma3n_onnx.runtime.serve.reading import ReadingLimits
from serving import DEMO, E2B, SUM, chat, data_url, eventually, image, message, serving

PICTURE = image(data_url(DEMO / "picture.png"))


@pytest.fixture(scope="module")
def slow():
    """The URL of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/picture.png"


@pytest.fixture(scope="module")
def limited(demo_artifact):
    media = MediaLimits(sources=4, urls=1, seconds=2)
    with serving([demo_artifact("E2B")], seconds=4, media=media, reading=ReadingLimits(media=8, queue=8)) as running:
        served = running.pool.acquire(E2B)
        served.model.generate(message("What is it?", PICTURE))  # loads the encoder, which may take longer
        running.pool.release(served)
        yield running


def test_slow_urls_delay_no_text_and_end_with_the_request(limited, slow):
    ask = message("What is it?", image(slow))
    with ThreadPoolExecutor(17) as pool:
        waits = [pool.submit(chat, limited, ask) for _ in range(17)]
        eventually(lambda: any(wait.done() for wait in waits))
        chat(limited, message(SUM))
        assert sum(wait.done() for wait in waits) == 1
        errors = sorted((wait.exception() for wait in waits), key=lambda error: error.status_code)
    assert [error.status_code for error in errors] == [429] + [504] * 16
    assert "reading the media of too many" in str(errors[0])


def test_slow_urls_whose_clients_are_gone_delay_nothing(limited, slow):
    def leave():
        with pytest.raises(openai.APITimeoutError):
            chat(limited, message("What is it?", image(slow)), timeout=0.2)

    with ThreadPoolExecutor(8) as pool:
        [wait.result() for wait in [pool.submit(leave) for _ in range(8)]]
    assert chat(limited, message("What is it?", PICTURE)).choices[0].message.content
    eventually(lambda: limited.pool.loaded[E2B].users == 0)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([PICTURE] * 5, "more than the 4 images, clips and videos"),
        ([image("http://host/a"), image("http://host/b")], "more than the 1 media URLs"),
        ([image(f"data:,{place}") for place in range(5)], "more than the 4 images, clips and videos"),
    ],
)
def test_media_of_a_request_are_counted_before_they_are_read(limited, parts, says):
    with pytest.raises(openai.BadRequestError, match=says):
        chat(limited, message("What is it?", *parts))


def test_the_total_holds_for_uploads_too(limited):
    sound = (DEMO / "sound.wav").read_bytes()
    with pytest.raises(openai.BadRequestError, match="more than the 2 seconds of sound and video"):
        limited.client.audio.transcriptions.create(model=E2B, file=("sound.wav", sound))
    assert httpx.get(f"{limited.url}/health").status_code == 200
