"""What `gemma3n serve` says and does before the first request."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from starlette.testclient import TestClient

from gemma3n_onnx.runtime.cli.serve import serve as serve_command
from gemma3n_onnx.runtime.serve import run
from gemma3n_onnx.runtime.serve.model_pool import ModelPool
from support import run_command


@pytest.fixture
def demo(demo_artifact: Any) -> Path:
    return demo_artifact("E2B")


@pytest.fixture
def half(demo_artifact: Any) -> Path:
    return demo_artifact("half")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Exit code, stderr, and the models that are loaded when the server would run."""
    loaded: list[str] = []

    def ready(app: Any, listening: socket.socket, times: Any) -> None:
        loaded.extend(TestClient(app, base_url="http://127.0.0.1").get("/health").json()["loaded"])
        listening.close()

    def command(*arguments: object) -> tuple[int, str, list[str]]:
        loaded.clear()
        monkeypatch.setattr(run, "run_app", ready)
        outcome = run_command(monkeypatch, ["gemma3n", "serve", "--port", "0", *map(str, arguments)])
        return outcome.code, re.sub(r":\d{4,}", ":PORT", outcome.err), [*loaded]

    return command


def test_it_says_what_is_served_where(serve: Any, demo: Path, half: Path) -> None:
    assert serve(demo) == (
        0,
        "Serving demo-E2B, loaded at the first request; requests need not name it.\n"
        "API: http://127.0.0.1:PORT/v1 (no key needed)\n"
        "Page: http://127.0.0.1:PORT\n",
        [],
    )
    both = (demo, half, "--served-model-name", "demo-E2B=gemma")
    code, told, _ = serve(*both, "--api-key", "secret")
    assert code == 0 and told.startswith("Serving demo-E2B, demo-half (also gemma), loaded at the first request.\n")
    assert "API: http://127.0.0.1:PORT/v1 (with the key)\n" in told and "secret" not in told


@pytest.mark.parametrize(
    ("address", "url"),
    [
        (("192.0.2.1", 80), "http://192.0.2.1:80"),
        (("::1", 8000, 0, 0), "http://[::1]:8000"),
        (("::", 8000, 0, 0), "http://[::1]:8000"),
        (("fe80::1%eth0", 8000, 0, 2), "http://[fe80::1]:8000"),
    ],
)
def test_the_address_is_one_that_browsers_take(address: Any, url: str) -> None:
    assert run.url_of(SimpleNamespace(getsockname=lambda: address)) == url


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--provider", "gpu"], 1, "Unknown provider 'gpu'; choose auto, cpu or cuda."),
        (["--provider", "cuda"], 1, "This ONNX Runtime has no CUDAExecutionProvider"),
        (["--threads", "0"], 1, "--threads must be a whole number of at least 1, not 0."),
        (["--device-id", "-1"], 1, "--device-id must be a whole number of at least 0, not -1."),
        (["--media-folder", "nowhere"], 2, "Directory 'nowhere' does not exist."),
        (["--timeout", "nan"], 2, "nan is not a finite number."),
        (["--models-memory", "inf"], 2, "inf is not a finite number."),
        (["--memory-budget", "nan"], 2, "nan is not a finite number."),
    ],
)
def test_what_no_request_could_use_is_refused_at_the_start(
    serve: Any, demo: Path, options: list[str], code: int, says: str
) -> None:
    found, told, _ = serve(demo, *options)
    assert found == code and says in told


def test_the_page_about_the_server_lists_every_option() -> None:
    page = (Path(__file__).parents[3] / "docs" / "server.md").read_text()
    options = [option for option in serve_command.params if isinstance(option, click.Option)]
    names = {option.name: {*option.opts, *option.secondary_opts} for option in options}
    assert [name for name, spelled in names.items() if not any(f"`{each}" in page for each in spelled)] == []


def test_other_machines_need_a_key_unless_it_is_said(serve: Any, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("0.0.0.0", "::"):
        code, told, _ = serve(demo, "--host", host)
        assert code == 1 and told.startswith(f"Error: Other machines reach {host}; set a key (--api-key or GEMMA3N_API")
    assert "(with the key)" in serve(demo, "--host", "0.0.0.0", "--api-key", "secret")[1]
    assert "(no key needed)" in serve(demo, "--host", "0.0.0.0", "--no-api-key")[1]
    monkeypatch.setenv("GEMMA3N_API_KEY", "secret")
    assert "(with the key)" in serve(demo, "--host", "0.0.0.0")[1]
    code, told, _ = serve(demo, "--no-api-key")
    assert code == 1 and "exclude each other; leave one out." in told


@pytest.mark.parametrize("key", ["", "two words", "schlüssel"])
def test_a_key_that_protects_nothing_is_refused(serve: Any, tmp_path: Path, key: str) -> None:
    code, told, _ = serve(tmp_path, "--api-key", key)
    assert code == 1 and told.startswith("Error: --api-key is empty, or has a space")


def test_models_are_preloaded_if_they_fit(serve: Any, demo: Path, half: Path) -> None:
    both = (demo, half, "--context", "256", "--rows", "1")
    code, told, loaded = serve(*both, "--preload")
    assert (code, loaded) == (0, ["demo-E2B", "demo-half"]) and told.startswith("Serving demo-E2B, demo-half.\n")
    code, told, loaded = serve(*both, "--preload", "--models-memory", "0.01")
    assert (code, loaded) == (1, [])
    assert re.fullmatch(r"Error: The models need 0\.\d\d GB and --models-memory is 0\.01; give more, .*\n", told)


def test_a_context_beyond_the_model_is_refused(serve: Any, demo: Path) -> None:
    code, told, _ = serve(demo, "--context", "4097")
    assert (code, told) == (1, "Error: --context is 4,097, but demo-E2B takes 4,096 tokens; give at most that.\n")
    assert serve(demo, "--context", "4096")[0] == 0
    assert serve(demo, "--context", "0")[1] == "Error: --context is 0; give at least 1.\n"


def test_a_port_in_use_is_told_before_models_load(serve: Any, demo: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(ModelPool, "preload", lambda _: pytest.fail("a model is loaded first"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        code, told, _ = serve(demo, "--preload", "--port", other.getsockname()[1])
    assert code == 1 and "another program uses the port" in told
