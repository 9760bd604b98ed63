"""Execution providers: one file each, and an entry of the table that selects among them."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from fake_provider import FakeProvider
from gemma3n_onnx.runtime import GenerationOptions, OnnxGemma3n
from gemma3n_onnx.runtime.artifact import load_manifest
from gemma3n_onnx.runtime.cli.measure import Sizes, measure
from gemma3n_onnx.runtime.engine import providers
from gemma3n_onnx.runtime.engine.prefix_cache import WORTH_SHARING
from gemma3n_onnx.runtime.engine.providers import select
from gemma3n_onnx.runtime.engine.providers.base import DeviceOptions, ExecutionProvider
from gemma3n_onnx.runtime.engine.providers.cpu import CPUProvider
from gemma3n_onnx.runtime.engine.providers.select import AUTO, PROVIDERS, choices, select_provider
from gemma3n_onnx.runtime.errors import OptionError, ProviderError
from gemma3n_onnx.runtime.generation.scheduler import Request, Scheduler, TokenEvent
from support import concrete_subclasses

SUM = [{"role": "user", "content": "What is 3 plus 4?"}]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(PROVIDERS, FakeProvider.name, FakeProvider)


@pytest.fixture(scope="module")
def folder(demo_artifact):
    return demo_artifact("E2B")


def test_a_new_provider_runs_everything(folder):
    cpu, fake = (OnnxGemma3n.from_pretrained(folder, provider) for provider in ("cpu", "fake"))
    assert isinstance(fake.engine.provider, FakeProvider)
    for options in ({}, {"temperature": 0.9, "seed": 1, "top_k": 20}, {"logprobs": 2}):
        wanted, found = (model.generate([SUM, SUM], max_new_tokens=12, **options) for model in (cpu, fake))
        assert [answer.token_ids for answer in found] == [answer.token_ids for answer in wanted]
    windows = {layer.info.window: layer.capacity for layer in fake.engine.new_cache(1, 999).layers}
    assert all(capacity == (999 if window is None else 2 * window) for window, capacity in windows.items())
    chat = fake.chat()
    assert [chat.send("What is 3 plus 4?").text for _ in range(2)] == ["3 plus 4 is 7."] * 2


def test_a_scheduler_without_host_memory_keeps_prefixes_in_its_rows(folder):
    model = OnnxGemma3n.from_pretrained(folder, "fake", prefix_cache_size=4)
    scheduler = Scheduler(model.engine, model.tokenizer, 2, 512, interleave=True)
    told = [Told(model, text) for text in ("What is 3 plus 4?", "What is 3 plus 5?")]
    for each in told:
        scheduler.submit(each.request)
        while scheduler.advance():
            pass
    assert [each.text for each in told] == ["3 plus 4 is 7.", "3 plus 5 is 8."]
    assert told[1].events[-1].cached_tokens >= WORTH_SHARING


def test_requests_that_overlap_on_a_device_do_not_disturb_each_other(folder):
    """A prompt is prefilled into a row that the others' steps compute, beside rows that end before and after it."""
    model = OnnxGemma3n.from_pretrained(folder, "fake", prefill_chunk=8)
    scheduler = Scheduler(model.engine, model.tokenizer, 2, 512, interleave=True)
    sums = [f"What is {a} plus {b}?" for a, b in ((1, 2), (3, 4), (9, 8), (5, 5), (7, 6))]
    told = [Told(model, text) for text in sums]
    for each in told:
        scheduler.submit(each.request)
        for _ in range(3):
            scheduler.advance()
    while scheduler.advance():
        pass
    alone = OnnxGemma3n.from_pretrained(folder, "cpu")
    assert [each.text for each in told] == [alone.generate(messages(text)).text for text in sums]


def messages(text):
    return [{"role": "system", "content": "You are a calculator. " * 4}, {"role": "user", "content": text}]


class Told:
    def __init__(self, model, text):
        self.events = []
        options = GenerationOptions(max_new_tokens=24)
        self.request = Request(model.encode(messages(text)), options, self.events.append)

    @property
    def text(self):
        return "".join(event.text for event in self.events if isinstance(event, TokenEvent))


def test_bench_reports_the_devices_memory_and_bandwidth(folder):
    figures = measure(folder, Sizes(32, 8, 64), 1, {"provider": "fake"})
    assert (figures.provider, figures.gpu_bytes, figures.bandwidth) == ("fake", 123_000_000, 7e9)


@pytest.mark.parametrize("kind", select.BUILT_IN, ids=lambda kind: kind.name)
def test_every_provider_is_whole(kind):
    """Its class implements the interface, its name is its own and an extra that installs it."""
    assert not kind.__abstractmethods__
    assert [other.name for other in select.BUILT_IN].count(kind.name) == 1
    assert kind.ort_name.endswith("ExecutionProvider") and kind.device and kind.targets
    assert isinstance(kind.host_memory, bool)
    extras = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert kind.name in extras


def test_auto_takes_the_provider_that_the_artifact_is_made_for(folder):
    manifest = load_manifest(folder)
    assert isinstance(select_provider(AUTO, manifest), CPUProvider)
    assert isinstance(select_provider(AUTO, replace(manifest, target="fake")), FakeProvider)
    assert isinstance(select_provider(AUTO, replace(manifest, target="cuda")), CPUProvider), "CUDA is not installed"


def test_what_cannot_be_selected(folder):
    manifest = load_manifest(folder)
    assert choices() == f"{', '.join([AUTO, *PROVIDERS][:-1])} or fake"
    with pytest.raises(OptionError, match=f"Unknown provider 'tpu'; choose {choices()}"):
        select_provider("tpu", manifest)
    with pytest.raises(ProviderError, match=r"no CUDAExecutionProvider .*gemma3n-onnx\[cuda\]"):
        select_provider("cuda", manifest)
    with pytest.raises(ProviderError, match="no device 4"):
        select_provider("fake", manifest, DeviceOptions(4))
    with pytest.raises(ProviderError, match="computes in bf16, which CPUExecutionProvider does not support"):
        select_provider("fake", replace(manifest, compute_dtype="bf16"))


def test_every_provider_is_in_the_table():
    assert {*select.BUILT_IN} == concrete_subclasses(ExecutionProvider, providers)
