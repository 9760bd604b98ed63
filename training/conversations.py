"""Conversations of the demo's world: what is asked in them, in what order, under which system prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .pictures import Picture, random_picture
from .questions import (
    NAMES,
    ONE_WORD,
    POLITE,
    Ask,
    Turn,
    about_both,
    about_picture,
    about_sound,
    about_text,
    casual,
    one_word,
    own_name,
)
from .sounds import Sound, random_sound

WEIGHTS = {"describe": 3.0, "how many shapes": 3.0, "is there": 3.0, "see and hear": 2.0, "sum": 2.0}
CASUAL_SHARE = 0.3
ONE_WORD_SHARE = 0.15
POLITE_SHARE = 0.1
NAME_SHARE = 0.12
MOST_TURNS = 8
EXAM = 4242
"""Begins the seeds of exams, and of nothing that is trained on."""


@dataclass(frozen=True)
class Conversation:
    """`media`, pictures and sounds, come with the first question, in their order."""

    system: str | None
    media: tuple[Picture | Sound, ...]
    turns: tuple[Turn, ...]

    @property
    def media_kinds(self) -> tuple[str, ...]:
        return tuple("image" if isinstance(medium, Picture) else "audio" for medium in self.media)


def messages_of(conversation: Conversation, sources: Sequence[Any]) -> list[dict[str, Any]]:
    """The conversation as messages for a model, up to its last question; `sources` are those of its media."""
    messages: list[dict[str, Any]] = []
    if conversation.system is not None:
        messages.append({"role": "system", "content": conversation.system})
    for number, turn in enumerate(conversation.turns):
        media = zip(conversation.media_kinds, sources) if number == 0 else ()
        parts = [{"type": kind, kind: source} for kind, source in media]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": turn.answer})
    return messages[:-1]


def random_conversation(rng: np.random.Generator, picture: Picture | None, sound: Sound | None) -> Conversation:
    """A conversation to train on, about the picture, the sound, both, or neither."""
    if picture is None and sound is None:
        return _about_text(rng)
    asks = _asks(picture, sound)
    weights = np.array([WEIGHTS.get(ask(rng).task, 1.0) for ask in asks])
    count = min(int(rng.integers(1, MOST_TURNS + 1)), len(asks))
    order = rng.choice(len(asks), size=count, replace=False, p=weights / weights.sum())
    turns = [asks[i](rng) for i in order]
    system = None
    chance = rng.random()
    if chance < ONE_WORD_SHARE and (short := [word for turn in turns if (word := one_word(turn))]):
        system, turns = str(rng.choice(ONE_WORD)), short
    elif chance > 1 - POLITE_SHARE:
        system = str(rng.choice(POLITE))
    media: tuple[Picture | Sound, ...] = tuple(medium for medium in (picture, sound) if medium is not None)
    return Conversation(system, media[::-1] if rng.random() < 0.2 else media, _casual(rng, turns))


def _asks(picture: Picture | None, sound: Sound | None) -> list[Ask]:
    asks: list[Ask] = []
    if picture is not None and sound is not None:
        asks += about_both(picture, sound)
    if picture is not None:
        asks += about_picture(picture)
    if sound is not None:
        asks += about_sound(sound)
    return asks


def _about_text(rng: np.random.Generator) -> Conversation:
    chance = rng.random()
    if chance < NAME_SHARE:
        name = str(rng.choice(NAMES))
        return Conversation(f"Your name is {name}.", (), _casual(rng, [own_name(rng, name)]))
    asks = about_text(held_out=False)
    weights = np.array([WEIGHTS.get(ask(rng).task, 1.0) for ask in asks])
    turn = asks[int(rng.choice(len(asks), p=weights / weights.sum()))](rng)
    if chance > 1 - ONE_WORD_SHARE and (short := one_word(turn)):
        return Conversation(str(rng.choice(ONE_WORD)), (), _casual(rng, [short]))
    return Conversation(str(rng.choice(POLITE)) if rng.random() < POLITE_SHARE else None, (), _casual(rng, [turn]))


def _casual(rng: np.random.Generator, turns: Sequence[Turn]) -> tuple[Turn, ...]:
    return tuple(
        Turn(turn.task, casual(rng, turn.question), turn.answer) if rng.random() < CASUAL_SHARE else turn
        for turn in turns
    )


def exam(seed: int, each: int) -> dict[str, list[Conversation]]:
    """`each` conversations of one question for every task, on pictures, sounds and numbers not trained on."""
    rng = np.random.default_rng([EXAM, seed])
    tasks: dict[str, list[Conversation]] = {}

    def add(ask: Ask, system: str | None, *media: Picture | Sound) -> None:
        turn = ask(rng)
        if system in ONE_WORD:
            short = one_word(turn)
            if short is None:
                return
            turn = short
        of_task = tasks.setdefault(turn.task, [])
        if len(of_task) < each:
            of_task.append(Conversation(system, media, (turn,)))

    while not tasks or any(len(of_task) < each for of_task in tasks.values()):
        picture, sound, name = random_picture(rng), random_sound(rng), str(rng.choice(NAMES))
        for ask in about_picture(picture):
            add(ask, None, picture)
            add(ask, str(rng.choice(ONE_WORD)), picture)
        for ask in about_sound(sound):
            add(ask, None, sound)
            add(ask, str(rng.choice(ONE_WORD)), sound)
        for ask in about_both(picture, sound):
            add(ask, None, picture, sound)
        for ask in about_text(held_out=True):
            add(ask, None)
        add(partial(own_name, name=name), f"Your name is {name}.")
    return tasks
