"""Names of models, and unloading by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from gemma3n_onnx.runtime import OptionError
from gemma3n_onnx.runtime.serve.model_pool import ModelPool, ServeOptions
from serving import E2B, HALF, SUM, chat, message, serving

OPTIONS = ServeOptions(rows=2, context=512)


@pytest.fixture(scope="module")
def named(demo_artifact: Any) -> Iterator[SimpleNamespace]:
    with serving([demo_artifact("E2B")], OPTIONS, aliases=["gemma", "org/gemma"]) as running:
        yield running


@pytest.mark.parametrize("name", [E2B, f"{E2B}:latest", "gemma", "org/gemma", "default", "ignore", ""])
def test_a_model_by_any_of_its_names(named: Any, name: str) -> None:
    assert chat(named, message(SUM), model=name, max_tokens=24).choices[0].message.content == "3 plus 4 is 7."


def test_names_are_listed_and_found(named: Any) -> None:
    assert [model.id for model in named.client.models.list()] == [E2B, "gemma", "org/gemma"]
    assert httpx.get(f"{named.url}/v1/models/org/gemma").json()["max_model_len"] == 512
    body = {"messages": message(SUM), "max_tokens": 4}
    url = f"{named.url}/v1/chat/completions"
    assert httpx.post(url, json=body).status_code == 200, "no model at all"


def test_where_several_are_served_a_name_is_needed(server: Any) -> None:
    body = {"messages": message(SUM), "max_tokens": 4}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert response.status_code == 404 and "available: demo-E2B, demo-half" in response.json()["error"]["message"]


def test_folders_are_named_as_they_are_given(
    demo_artifact: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "google").mkdir()
    (tmp_path / "google" / "gemma-3n-E4B-it").symlink_to(demo_artifact("E2B"))
    monkeypatch.chdir(tmp_path)
    pool = ModelPool([Path("google/gemma-3n-E4B-it")], OPTIONS, {})
    assert pool.names == ["google/gemma-3n-E4B-it", "gemma-3n-E4B-it"]
    assert pool.resolve("google/gemma-3n-E4B-it") == pool.resolve("gemma-3n-E4B-it") == pool.resolve("default")


def test_a_short_name_of_two_models_names_none(
    demo_artifact: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x").symlink_to(demo_artifact("E2B"))
    monkeypatch.chdir(tmp_path)
    assert ModelPool([Path("a/x"), Path("b/x")], OPTIONS, {}).names == ["a/x", "b/x"]


def test_aliases_of_several_models(demo_artifact: Any) -> None:
    folders = [demo_artifact("E2B"), demo_artifact("half")]
    pool = ModelPool(folders, OPTIONS, {}, [f"{E2B}=big", f"{HALF}=small"])
    assert (pool.resolve("big"), pool.resolve("small")) == (E2B, HALF)
    for wrong in ("big", "other=big", f"{E2B}=", f"{E2B}={HALF}"):
        with pytest.raises(OptionError, match="alias"):
            ModelPool(folders, OPTIONS, {}, [wrong])


def test_a_model_is_unloaded_on_request(named: Any) -> None:
    chat(named, message(SUM), max_tokens=4)
    url = f"{named.url}/v1/models/gemma/unload"
    assert httpx.post(url, json={"encoders": True}).json()["unloaded"] and named.pool.loaded
    assert httpx.post(url).json() == {"id": "gemma", "object": "model", "unloaded": True}
    assert not named.pool.loaded and not httpx.post(url).json()["unloaded"]
    endless = {"logit_bias": {"106": -100, "1": -100}, "max_tokens": 400, "stream": True}
    stream = chat(named, message(SUM), **endless)
    next(stream)
    busy = httpx.post(url)
    stream.close()
    assert busy.status_code == 429 and "requests are using" in busy.json()["error"]["message"]
