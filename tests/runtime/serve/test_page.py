"""The files of the page; `ci/page/run.sh` has a browser use it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from gemma3n_onnx.runtime.serve.app import Access
from serving import serving

STATIC = Path(__file__).parents[3] / "runtime" / "serve" / "page" / "static"
NAMESPACE = "http://www.w3.org/2000/svg"


def test_the_page_allows_scripts_of_its_own_files_only(server: Any) -> None:
    page = httpx.get(server.url)
    assert page.headers["content-type"] == "text/html; charset=utf-8" and "<textarea" in page.text
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"
    inline = re.findall(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", page.text)
    assert inline == [], "the policy forbids these"


def test_every_file_that_the_page_names_is_served(server: Any) -> None:
    named = {
        *re.findall(r'(?:href|src)="page/([^"]+)"', (STATIC / "index.html").read_text()),
        *(name for file in STATIC.glob("*.js") for name in re.findall(r'from "\./([^"]+)"', file.read_text())),
    }
    assert named == {file.name for file in STATIC.iterdir()} - {"index.html"}
    kinds = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    for name in named:
        sent = httpx.get(f"{server.url}/page/{name}")
        assert sent.content == (STATIC / name).read_bytes()
        assert sent.headers["content-type"].startswith(kinds[Path(name).suffix])
        assert sent.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/page/none.js", "/page/..%2f__init__.py", "/page/%2e%2e/__init__.py"])
def test_no_other_file_is_served(server: Any, path: str) -> None:
    assert httpx.get(server.url + path).status_code == 404


def test_the_page_names_no_other_host() -> None:
    for file in STATIC.iterdir():
        assert not re.search(r"(?:https?|wss?)://\w|[\"(]//", file.read_text().replace(NAMESPACE, "")), file.name


def test_the_page_opens_without_the_key(demo_artifact: Any) -> None:
    with serving([demo_artifact("E2B")], access=Access(api_key="secret")) as running:
        for path, status in (("/", 200), ("/page/chat.js", 200), ("/v1/models", 401), ("/page", 401)):
            assert httpx.get(running.url + path).status_code == status, path
