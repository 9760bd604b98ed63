"""Several models within a memory budget."""

from __future__ import annotations

import shutil
import weakref
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import openai
import pytest

from gemma3n_onnx.runtime import ArtifactError, ArtifactNotFoundError, OnnxGemma3n, OptionError, ProviderError
from gemma3n_onnx.runtime.artifact import load_manifest
from gemma3n_onnx.runtime.serve.model_pool import ModelPool, ServeOptions, artifacts_in, estimated_bytes, scorer_bytes
from gemma3n_onnx.runtime.serve.run import bind
from gemma3n_onnx.runtime.serve.worker import BusyError
from serving import E2B, HALF, LONG_ANSWER, SUM, chat, message, serving
from support import record


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


@pytest.fixture
def folder(small_artifact, tmp_path):
    return Path(shutil.copytree(small_artifact, tmp_path / "small"))


def replace_template(folder):
    (folder / "chat_template.jinja").write_text("{{ 'another one' }}")
    record(folder, "chat_template.jinja")


def template_of(pool):
    served = pool.acquire("small")
    pool.release(served)
    return served.model.template.source


def test_a_replaced_artifact_is_loaded_again(folder):
    with closing(ModelPool([folder], ServeOptions(rows=1), {})) as pool:
        assert "start_of_turn" in template_of(pool)
        replace_template(folder)
        assert template_of(pool) == "{{ 'another one' }}"
        assert pool.counts()["small"] is not None and [*pool.loaded] == ["small"]


def test_a_replaced_artifact_waits_for_the_requests_of_the_old_one(folder):
    with closing(ModelPool([folder], ServeOptions(rows=1), {})) as pool:
        served = pool.acquire("small")
        replace_template(folder)
        with pytest.raises(BusyError, match="small was replaced on the disk and is in use; try again"):
            pool.acquire("small")
        pool.release(served)
        assert template_of(pool) == "{{ 'another one' }}"


def test_an_artifact_that_is_replaced_while_it_loads_is_not_served(folder, monkeypatch):
    load = OnnxGemma3n.from_pretrained

    def slowly(*arguments, **options):
        model = load(*arguments, **options)
        replace_template(folder)
        return model

    monkeypatch.setattr(OnnxGemma3n, "from_pretrained", slowly)
    with closing(ModelPool([folder], ServeOptions(rows=1), {})) as pool:
        with pytest.raises(BusyError, match="small was replaced on the disk while it was loaded; try again"):
            pool.acquire("small")
        monkeypatch.undo()
        assert template_of(pool) == "{{ 'another one' }}"


def test_an_artifact_that_is_gone_or_damaged_is_a_sentence_until_it_is_back(folder):
    with closing(ModelPool([folder], ServeOptions(rows=1), {})) as pool:
        before = template_of(pool)
        folder.rename(folder.with_name("away"))
        with pytest.raises(ArtifactNotFoundError, match="There is no artifact folder"):
            pool.acquire("small")
        folder.with_name("away").rename(folder)
        assert template_of(pool) == before
        (folder / "tokenizer.json").write_text("{}")
        with pytest.raises(ArtifactError, match=r"tokenizer\.json has 2 bytes"):
            pool.acquire("small")


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
    """Before the model is loaded and after it: its encoders would load from another export."""
    folder, away = shutil.copytree(demo_artifact("E2B"), tmp_path / "demo-E2B"), tmp_path / "away"
    with serving([folder], ServeOptions(rows=1, context=512)) as running:
        for _ in range(2):
            folder.rename(away)
            with pytest.raises(openai.InternalServerError, match="There is no artifact folder") as caught:
                chat(running, message(SUM))
            assert (caught.value.status_code, caught.value.code) == (503, "model_unavailable")
            away.rename(folder)
            assert chat(running, message(SUM)).choices[0].message.content == "3 plus 4 is 7."
