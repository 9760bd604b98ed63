"""A server in this process, and OpenAI's client of it."""

from __future__ import annotations

import base64
import contextlib
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest

from gemma3n_onnx.runtime import FetchPolicy
from gemma3n_onnx.runtime.serve.app import Access, create_app
from gemma3n_onnx.runtime.serve.model_pool import ModelPool, ServeOptions
from gemma3n_onnx.runtime.serve.run import Times, bind, server_of, url_of
from gemma3n_onnx.runtime.serve.service import Limits

DEMO = Path(__file__).parents[3] / "demo"
E2B, HALF = "demo-E2B", "demo-half"
SUM = "What is 3 plus 4?"
LONG_ANSWER = "Count from 1 to 40."


def message(text: str, *parts: dict) -> list[dict]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}]


def image(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


@contextlib.contextmanager
def serving(
    folders: list[Path],
    options: ServeOptions | None = None,
    access: Access | None = None,
    aliases=(),
    times: Times | None = None,
    connections: int = 512,
    **limits,
):
    """The application on a port of its own: `url`, `client` and `pool`."""
    fetch = FetchPolicy(allow_private=True, files_under=DEMO)
    pool = ModelPool(folders, options or ServeOptions(rows=4, context=1024), {"fetch": fetch, "threads": 1}, aliases)
    app = create_app(pool, Limits(**limits), access)
    listening = bind("127.0.0.1", 0, connections)
    url = url_of(listening)
    server = server_of(app, times or Times())
    thread = threading.Thread(target=server.run, args=[[listening]])
    thread.start()
    while not server.started:
        time.sleep(0.01)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=(access and access.api_key) or "none", max_retries=0)
    try:
        yield SimpleNamespace(url=url, client=client, pool=pool)
    finally:
        client.close()
        server.should_exit = True
        thread.join()


def chat(server, messages, model: str = E2B, **options):
    return server.client.chat.completions.create(model=model, messages=messages, **({"temperature": 0} | options))


def eventually(condition) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("it never came to be")
