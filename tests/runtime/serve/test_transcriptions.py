"""/v1/audio/transcriptions, asked by OpenAI's own client."""

from __future__ import annotations

from serving import DEMO, E2B


def test_a_transcription(server):
    with (DEMO / "sound.wav").open("rb") as file:
        made = server.client.audio.transcriptions.create(model=E2B, file=file, prompt="What do you hear?")
    assert made.text == "Three high beeps."
    with (DEMO / "sound.wav").open("rb") as file:
        made = server.client.audio.transcriptions.create(
            model=E2B, file=file, prompt="What do you hear?", response_format="text"
        )
    assert made == "Three high beeps."
