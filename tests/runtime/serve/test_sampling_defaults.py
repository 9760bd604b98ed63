"""Sampling values of a request: its own, else the server's, else the checkpoint's."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from gemma3n_onnx.runtime import GenerationOptions, OptionError
from gemma3n_onnx.runtime.serve.model_pool import ServeOptions
from serving import E2B, SUM, message, serving

USER = {"messages": message(SUM)}


@pytest.fixture(scope="module")
def hot(demo_artifact: Any) -> Iterator[SimpleNamespace]:
    with serving(
        [demo_artifact("E2B")], ServeOptions(context=512, sampling={"temperature": 0.5, "top_k": 8})
    ) as running:
        yield running


def values(options: GenerationOptions) -> tuple[Any, ...]:
    return options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", USER),
        ("/v1/completions", {"prompt": "3 plus 4 is"}),
        ("/v1/responses", {"input": SUM}),
        ("/v1/messages", USER),
    ],
)
def test_every_api_samples_as_the_checkpoint_says(
    server: Any, submitted: list[GenerationOptions], path: str, body: dict[str, Any]
) -> None:
    response = httpx.post(server.url + path, json={"model": E2B} | body, timeout=60)
    assert response.status_code == 200
    assert [values(options) for options in submitted] == [(1.0, 64, 0.95, None, 1.0)]
    if "responses" in path:
        assert (response.json()["temperature"], response.json()["top_p"]) == (1.0, 0.95)


@pytest.mark.parametrize(
    ("own", "used"),
    [
        ({}, (0.5, 8, 0.95, None, 1.0)),
        ({"temperature": 0, "min_p": 0.1, "repetition_penalty": 1.2}, (0.0, 8, 0.95, 0.1, 1.2)),
        ({"temperature": 1.5, "top_k": 0, "top_p": 1}, (1.5, None, 1.0, None, 1.0)),
        ({"temperature": None, "top_p": 0}, (0.0, 8, None, None, 1.0)),
    ],
)
def test_a_request_comes_before_the_server_and_that_before_the_checkpoint(
    hot: Any, submitted: list[GenerationOptions], own: dict[str, Any], used: tuple[Any, ...]
) -> None:
    assert httpx.post(f"{hot.url}/v1/chat/completions", json=USER | own, timeout=60).status_code == 200
    assert [values(options) for options in submitted] == [used]


def test_values_of_the_server_are_checked_when_it_starts() -> None:
    with pytest.raises(OptionError, match="top_p must be"):
        ServeOptions(sampling={"top_p": 2})
