"""The requests of mistral.rs' page about Gemma 3n.

Only addresses and the key are other ones: https://ericlbuehler.github.io/mistral.rs/GEMMA3N.html
"""

from __future__ import annotations

from openai import OpenAI

from checks import BASE, FILES_URL, KEY, SOUND_BASE64, Checks

check = Checks("mistral.rs' page", "openai")
client = OpenAI(api_key=KEY, base_url=f"{BASE}/")
IMAGE = {"type": "image_url", "image_url": {"url": f"{FILES_URL}/picture.png"}}
DESCRIBE = {"type": "text", "text": "Please describe this image in detail."}


def tokens_of(*parts: dict, model: str = "default", **options) -> int:
    """Tokens of the prompt."""
    messages = [{"role": "user", "content": [*parts]}]
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=256, **options)
    assert isinstance(answer.choices[0].message.content, str)
    return answer.usage.prompt_tokens


@check("text")
def _() -> None:
    assert tokens_of({"type": "text", "text": "Hello!"}, temperature=0) > 3


@check("image")
def _() -> None:
    for model in ("default", "ignore"):
        given = {"model": model, "frequency_penalty": 1.0, "top_p": 0.1, "temperature": 0}
        assert tokens_of(IMAGE, DESCRIBE, **given) > 200


@check("audio")
def _() -> None:
    what = {"type": "text", "text": "Describe what is happening in this clip in as much detail as possible."}
    sounds = (
        {"type": "audio_url", "audio_url": {"url": f"{FILES_URL}/sound.wav"}},
        {"type": "input_audio", "input_audio": {"data": SOUND_BASE64, "format": "wav"}},
    )
    for sound in sounds:
        alone = tokens_of(sound, what, temperature=0)
        assert tokens_of(sound, IMAGE, what, temperature=0) > alone + 200 > tokens_of(what, temperature=0) + 200
