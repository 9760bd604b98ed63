"""Exams: conversations on pictures, sounds and numbers that training never has."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from .conversations import MOST_TURNS, TALK, Conversation, Medium, naming, next_turn
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
    one_word,
    own_name,
)
from .sounds import Sound, random_sound

EXAM = 4242
"""Begins the seeds of exams, and of nothing that is trained on."""
HABITS = replace(TALK, text=0.5, aside=0.1, aside_text=0.5, media_last=0.5)
LATER = "{}, later turn"
MEDIA_SHARE = 0.75
"""Of the conversations of several turns, so many have a picture, and so many a sound."""


def exam(seed: int, each: int) -> dict[str, list[Conversation]]:
    """`each` conversations of one question for every task."""
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
            of_task.append(Conversation(system, (replace(turn, media=media),)))

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
        add(partial(own_name, name=name), naming(name))
    return tasks


def later_exam(seed: int, each: int) -> dict[str, list[Conversation]]:
    """`each` conversations of two to six questions for every task that the last one may be of."""
    rng = np.random.default_rng([EXAM, seed, 1])
    tasks: dict[str, list[Conversation]] = {LATER.format(task): [] for task in exam(seed, 8)}
    while any(len(of_task) < each for of_task in tasks.values()):
        conversation = held_out_conversation(rng, int(rng.integers(2, MOST_TURNS + 1)))
        of_task = tasks[LATER.format(conversation.turns[-1].task)]
        if len(of_task) < each:
            of_task.append(conversation)
    return tasks


def held_out_conversation(rng: np.random.Generator, length: int) -> Conversation:
    """Of `length` turns. A picture and a sound come with any question, before or after its text, or not at all; under
    a system prompt that wants one word, one of them comes with the first."""
    kind = rng.integers(5)
    prompts = {0: POLITE, 1: [naming(name) for name in NAMES], 2: ONE_WORD}.get(int(kind))
    system = None if prompts is None else str(rng.choice(prompts))
    arrivals: list[list[Medium]] = [[] for _ in range(length)]
    media = [random_picture(rng), random_sound(rng)]
    for number in rng.permutation(2):
        if system in ONE_WORD and not any(arrivals):
            arrivals[0].append(media[number])
        elif rng.random() < MEDIA_SHARE:
            arrivals[int(rng.integers(length))].append(media[number])
    turns: list[Exchange] = []
    seen: list[Medium] = []
    for new in arrivals:
        turns.append(next_turn(rng, HABITS, system, seen, new, held_out=True))
        seen += new
    return Conversation(system, tuple(turns))
