"""Several models within a memory budget."""

from __future__ import annotations

import shutil
import weakref
from dataclasses import replace

import openai
import pytest

from gemma3n_onnx.runtime import ArtifactError, OptionError, ProviderError
from gemma3n_onnx.runtime.artifact import load_manifest
from gemma3n_onnx.runtime.serve.model_pool import ModelPool, ServeOptions, artifacts_in, estimated_bytes, scorer_bytes
from gemma3n_onnx.runtime.serve.run import bind
from gemma3n_onnx.runtime.serve.worker import BusyError
from serving import DEMO, E2B, HALF, LONG_ANSWER, SUM, chat, data_url, image, message, serving


def test_a_request_chooses_its_slice(server):
    for name in (E2B, HALF, E2B):
        answer = chat(server, message(SUM), model=name)
        assert (answer.model, answer.choices[0].message.content) == (name, "3 plus 4 is 7.")
    assert {*server.pool.loaded} == {E2B, HALF}
    listed = {model.id: model for model in server.client.models.list()}
    assert {*listed} == {E2B, HALF} and listed[HALF].slice == "half"
    assert server.client.models.retrieve(E2B).id == E2B


def test_models_that_rest_make_room(demo_artifact):
    folders = [demo_artifact(name) for name in ("E2B", "half")]
    sizes = [estimated_bytes(load_manifest(folder), 1, 512) for folder in folders]
    options = ServeOptions(rows=1, context=512, memory_budget=max(sizes))
    engines: list[weakref.ref] = []
    with serving(folders, options) as running:
        for name in (E2B, HALF, E2B):
            assert chat(running, message(SUM), model=name).choices[0].message.content == "3 plus 4 is 7."
            assert [*running.pool.loaded] == [name]
            engines.append(weakref.ref(running.pool.loaded[name].model.engine))
        assert [engine() is None for engine in engines] == [True, True, False], "unloaded models stay in memory"
        endless = {"logit_bias": {"106": -100, "1": -100}, "max_tokens": 400}
        stream = chat(running, message(LONG_ANSWER), stream=True, **endless)
        next(stream)
        with pytest.raises(openai.RateLimitError, match="Every model in memory is in use"):
            chat(running, message(SUM), model=HALF)
        stream.close()


def test_a_scorer_needs_room_too(demo_artifact):
    folders = [demo_artifact(name) for name in ("E2B", "half")]
    manifest = load_manifest(folders[0])
    first, second = (estimated_bytes(load_manifest(folder), 1, 512) for folder in folders)
    scorer = scorer_bytes(manifest, 512)
    pool = ModelPool(folders, ServeOptions(rows=1, context=512, memory_budget=first + max(second, scorer)), {})
    served, other = pool.acquire(E2B), pool.acquire(HALF)
    with pytest.raises(BusyError):
        pool.reserve_scorer(served)
    assert served.bytes == first
    pool.release(other)
    for _ in range(2):
        pool.reserve_scorer(served)
        assert [*pool.loaded] == [E2B] and served.bytes == first + scorer
    pool.close()
    small = ModelPool(folders[:1], ServeOptions(rows=1, context=512, memory_budget=first), {})
    with pytest.raises(ProviderError, match=r"Scoring text with demo-E2B takes .* raise --models-memory"):
        small.reserve_scorer(small.acquire(E2B))
    small.close()


def test_weights_count_twice_unless_they_are_shared(demo_artifact):
    manifest = load_manifest(demo_artifact("E2B"))
    cache = sum(2 * info.kv_heads * info.head_dim * 4 * 1024 for info in manifest.caches)
    assert scorer_bytes(manifest, 512) == cache
    halved = replace(manifest, storage="fp16")
    assert scorer_bytes(halved, 512) == cache + manifest.step_bytes


def test_what_cannot_be_served(demo_artifact, tmp_path):
    with pytest.raises(ArtifactError, match="No artifact to serve"):
        ModelPool([], ServeOptions(), {})
    with pytest.raises(ArtifactError, match="No such folder"):
        artifacts_in(tmp_path / "none")
    folder = demo_artifact("E2B")
    with pytest.raises(ArtifactError, match="same name"):
        ModelPool([folder, folder], ServeOptions(), {})
    with pytest.raises(OptionError, match="--context is 4,097, but demo-E2B takes 4,096 tokens; give at most that"):
        ModelPool([folder], ServeOptions(context=4097), {})
    assert folder in artifacts_in(folder.parent)
    with pytest.raises(OptionError, match="--rows is 0"):
        ServeOptions(rows=0)
    with pytest.raises(OptionError, match="Cannot listen on"):
        bind("192.0.2.1", 80, 512)


def test_a_folder_that_goes_while_it_is_served_is_told(demo_artifact, tmp_path):
    folder = shutil.copytree(demo_artifact("E2B"), tmp_path / "demo-E2B")
    picture = message("What is in the picture?", image(data_url(DEMO / "picture.png")))
    with serving([folder], ServeOptions(rows=1, context=512)) as running:
        folder = folder.rename(tmp_path / "away")
        with pytest.raises(openai.InternalServerError, match="There is no artifact folder") as caught:
            chat(running, message(SUM))
        assert (caught.value.status_code, caught.value.code) == (503, "model_unavailable")
        folder = folder.rename(tmp_path / "demo-E2B")
        answer = chat(running, message(SUM))
        folder.rename(tmp_path / "away")
        assert chat(running, message(SUM)).choices == answer.choices, "it is loaded"
        with pytest.raises(openai.InternalServerError, match=r"cannot load .*vision_encoder\.onnx") as caught:
            chat(running, picture)
        assert (caught.value.status_code, caught.value.code) == (503, "model_unavailable")
