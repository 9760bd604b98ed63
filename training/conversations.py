"""Conversations of the demo's world: what is asked in them, in what order, under which system prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from .pictures import Picture, random_picture
from .questions import (
    NAMES,
    ONE_WORD,
    POLITE,
    Ask,
    Exchange,
    about_both,
    about_picture,
    about_sound,
    about_text,
    casual,
    one_word,
    own_name,
)
from .sounds import Sound, random_sound

WEIGHTS = {
    "describe": 2.0,
    "how many shapes": 5.0,
    "is there": 2.5,
    "where": 2.0,
    "how many beeps": 1.5,
    "see and hear": 3.0,
    "more shapes or beeps": 3.0,
    "sum": 6.0,
    "count": 3.0,
    "repeat": 1.5,
}
"""How often a task is asked; others 1."""
CASUAL_SHARE = 0.3
ONE_WORD_SHARE = 0.15
SYSTEM_SHARE = 0.25
NAME_SHARE = 0.1
SWAPPED_SHARE = 0.2
SINGLE_TURN_SHARE = 0.8
MOST_TURNS = 3
EXAM = 4242
"""Begins the seeds of exams, and of nothing that is trained on."""


@dataclass(frozen=True)
class Conversation:
    """`media`, pictures and sounds, come with the first question, in their order."""

    system: str | None
    media: tuple[Picture | Sound, ...]
    turns: tuple[Exchange, ...]

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


def random_row(
    rng: np.random.Generator, picture: Picture | None, sound: Sound | None, count: int
) -> list[Conversation]:
    """`count` conversations to train on, about the picture, the sound, both, or neither, that begin alike."""
    if picture is None and sound is None:
        return [_about_text(rng) for _ in range(count)]
    asks = _asks(picture, sound)
    tasks = [ask(rng).task for ask in asks]
    weights = np.array([WEIGHTS.get(task, 1.0) / tasks.count(task) for task in tasks])
    media: tuple[Picture | Sound, ...] = tuple(medium for medium in (picture, sound) if medium is not None)
    media = media[::-1] if rng.random() < SWAPPED_SHARE else media
    chance = rng.random()
    system = str(rng.choice(ONE_WORD if chance < ONE_WORD_SHARE else POLITE)) if chance < SYSTEM_SHARE else None
    row: list[Conversation] = []
    while len(row) < count:
        length = 1 if rng.random() < SINGLE_TURN_SHARE else int(rng.integers(2, MOST_TURNS + 1))
        turns = [asks[i](rng) for i in rng.choice(len(asks), size=length, p=weights / weights.sum())]
        if system in ONE_WORD:
            turns = [short for turn in turns if (short := one_word(turn))]
        if turns:
            row.append(Conversation(system, media, _casual(rng, turns)))
    return row


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
    return Conversation(str(rng.choice(POLITE)) if chance > 1 - SYSTEM_SHARE else None, (), _casual(rng, [turn]))


def _casual(rng: np.random.Generator, turns: Sequence[Exchange]) -> tuple[Exchange, ...]:
    return tuple(
        replace(turn, question=casual(rng, turn.question)) if rng.random() < CASUAL_SHARE else turn for turn in turns
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
