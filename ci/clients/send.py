"""Sends requests as clients write them to a server of the demo, and prints what was wanted and what came.

    gemma3n serve demo-E2B --context 2048 --allow-origins http://localhost:3000
    python ci/clients/send.py http://127.0.0.1:8000

Reads tests/clients/requests.jsonl and, as an answer's schema and as a tool's parameters, every schema of
tests/runtime/constraints/schemas.jsonl. Exits with 1 if an answer is not as wanted.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

TESTS = Path(__file__).parents[2] / "tests"
SHOWN = 100
REFUSED = {"required unknown"}


def main() -> None:
    url = sys.argv[1].rstrip("/")
    wrong = 0
    for name, why, came, good in (*requests(url), *schemas(url)):
        wrong += not good
        print(f"{'ok   ' if good else 'WRONG'} {name}\n      wanted: {why}\n      came:   {came}")
    print(f"{wrong} wrong")
    sys.exit(bool(wrong))


def requests(url: str) -> Iterator[tuple[str, str, str, bool]]:
    for line in lines("clients/requests.jsonl"):
        headers = {"Content-Type": "application/json", **line["headers"]}
        headers = {key: value for key, value in headers.items() if value is not None}
        content = None if line["body"] is None else json.dumps(line["body"])
        response = httpx.request(line["method"], url + line["path"], content=content, headers=headers, timeout=120)
        wanted = line["wanted"]
        header, value = wanted.get("header", (None, None))
        good = response.status_code == wanted["status"] and (header is None or response.headers.get(header) == value)
        good = good and bool(re.search(wanted.get("text", ""), response.text))
        yield line["name"], line["why"], f"{response.status_code} {said(response)}", good


def schemas(url: str) -> Iterator[tuple[str, str, str, bool]]:
    """A schema works; one that nothing matches is refused by a sentence."""
    for line in lines("runtime/constraints/schemas.jsonl"):
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": line["schema"]}}
        tool = {"type": "function", "function": {"name": "f", "parameters": line["schema"]}}
        for kind, fields in (
            ("answer", {"response_format": wanted}),
            ("call", {"tools": [tool], "tool_choice": "required"}),
        ):
            body = {"model": "demo-E2B", "messages": [{"role": "user", "content": "Go."}], "max_tokens": 400, **fields}
            response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
            refused = line["name"] in REFUSED
            expected = "a sentence that refuses it" if refused else "it works, or is checked after generation"
            good = response.status_code in ((400,) if refused else (200, 422))
            yield f"{line['name']} ({kind})", expected, f"{response.status_code} {said(response)}", good


def lines(file: str) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in (TESTS / file).read_text(encoding="utf-8").splitlines()]


def said(response: httpx.Response) -> str:
    """The part of an answer that tells most."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:SHOWN]
    choices = body.get("choices") or [{}]
    told = (body.get("error") or {}).get("message") or choices[0].get("message") or choices[0].get("text") or body
    return (told if isinstance(told, str) else json.dumps(told, ensure_ascii=False))[:SHOWN]


if __name__ == "__main__":
    main()
