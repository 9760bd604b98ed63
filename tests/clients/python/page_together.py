"""The requests of Together's page about google/gemma-3n-E4B-it, with its client and with curl.

Only addresses and the key are other ones: https://www.together.ai/models/gemma-3n-e4b-it
"""

from __future__ import annotations

import json
import os
import subprocess

from together import Together

from checks import BASE, FILES_URL, KEY, URL, Checks

TEXT = [{"role": "user", "content": "What are some fun things to do in New York?"}]
IMAGE = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Describe what you see in this image."},
            {"type": "image_url", "image_url": {"url": f"{FILES_URL}/picture.png"}},
        ],
    }
]
NAME = "google/gemma-3n-E4B-it"

check = Checks("Together's page, Python", "together")
os.environ |= {"TOGETHER_BASE_URL": URL, "TOGETHER_API_KEY": KEY}
client = Together()


@check("text")
def _() -> None:
    answer = client.chat.completions.create(model=NAME, messages=TEXT)
    assert answer.choices[0].message.role == "assistant" and answer.usage.prompt_tokens > 10


@check("image")
def _() -> None:
    answer = client.chat.completions.create(model=NAME, messages=IMAGE)
    assert answer.choices[0].message.role == "assistant" and answer.usage.prompt_tokens > 200


_, release, *_ = subprocess.run(["curl", "--version"], check=True, capture_output=True, text=True).stdout.split()
check = Checks("Together's page, curl", "curl", release)


def curl(messages: list[dict]) -> dict:
    headers = ("-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json")
    body = json.dumps({"model": NAME, "messages": messages})
    command = ["curl", "--silent", "--show-error", "-X", "POST", f"{BASE}/chat/completions", *headers, "-d", body]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@check("text")
def _() -> None:
    assert curl(TEXT)["usage"]["prompt_tokens"] > 10


@check("image")
def _() -> None:
    assert curl(IMAGE)["usage"]["prompt_tokens"] > 200
