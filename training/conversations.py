"""Conversations of the demo's world: what is asked in them, in what order, under which system prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .pictures import Picture
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
from .sounds import Sound

Medium = Picture | Sound

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
ONE_WORD_SHARE, NAME_SHARE, POLITE_SHARE = 0.12, 0.08, 0.1
"""Of conversations, by their system prompts; others have none."""
SWAPPED_SHARE = 0.2
"""Of a picture and a sound that come at once, so many times the sound is first."""
CASUAL_SHARE = 0.3
TEXT_SHARE_IN_ONE_WORD = 0.05
"""Instead of `Habits.text` and `aside_text` where one word must do: sums, which are hard to answer so, are all that is
left of text."""
OWN_NAME_SHARE = 0.4
"""Of the questions asked under a system prompt that gives a name."""
MOST_TURNS = 6
MOST_BEFORE = 4
"""Turns before the first that brings media."""


@dataclass(frozen=True)
class Habits:
    """How conversations go that are trained on.

    most_turns: of a conversation. single: share of those that end as soon as their media have come and one question
    more is asked. text: of the questions asked while there is a picture or a sound, the share that are about neither.
    aside: of the turns that bring media, the share that may ask for something else. aside_text: of these, the share
    that are about no media at all. late: of the rows about media, the share that do not begin with any. apart: of those
    with both a picture and a sound, the share where these come with two questions. media_last: of the turns that bring
    media, the share that have them after the text.
    """

    most_turns: int
    single: float
    text: float = 0.0
    aside: float = 0.0
    aside_text: float = 0.0
    late: float = 0.0
    apart: float = 0.0
    media_last: float = 0.0


QUESTIONS = Habits(most_turns=3, single=0.8)
"""About what came at the beginning, most often one."""
TALK = Habits(
    most_turns=MOST_TURNS, single=0.3, text=0.35, aside=0.3, aside_text=0.6, late=0.5, apart=0.4, media_last=0.75
)
"""Conversations of all tasks. A question that media follow is the hardest to learn, so most media come last."""


@dataclass(frozen=True)
class Conversation:
    system: str | None
    turns: tuple[Exchange, ...]

    @property
    def media(self) -> tuple[Medium, ...]:
        """Those of all turns, in their order."""
        return sum((turn.media for turn in self.turns), ())

    @property
    def media_kinds(self) -> tuple[str, ...]:
        return tuple("image" if isinstance(medium, Picture) else "audio" for medium in self.media)


def messages_of(conversation: Conversation, sources: Sequence[Any]) -> list[dict[str, Any]]:
    """The conversation as messages for a model, up to its last question; `sources` are those of its media."""
    messages: list[dict[str, Any]] = []
    if conversation.system is not None:
        messages.append({"role": "system", "content": conversation.system})
    parts = iter([{"type": kind, kind: source} for kind, source in zip(conversation.media_kinds, sources)])
    for turn in conversation.turns:
        text = {"type": "text", "text": turn.question}
        media = [next(parts) for _ in turn.media]
        messages.append({"role": "user", "content": [text, *media] if turn.media_last else [*media, text]})
        messages.append({"role": "assistant", "content": turn.answer})
    return messages[:-1]


def next_turn(
    rng: np.random.Generator,
    habits: Habits,
    system: str | None,
    before: Sequence[Medium],
    new: Sequence[Medium] = (),
    *,
    held_out: bool = False,
) -> Exchange:
    """A turn after others that brought the media `before`. It brings `new`, and mostly asks about these."""
    seen = [*before, *new]
    about = new if new and rng.random() >= habits.aside else ()
    turn = None
    while turn is None:
        turn = _question(rng, habits.aside_text if new else habits.text, system, seen, about, held_out)
    return replace(turn, media=tuple(new), media_last=bool(new) and rng.random() < habits.media_last)


def _question(
    rng: np.random.Generator,
    text_share: float,
    system: str | None,
    seen: Sequence[Medium],
    about: Sequence[Medium],
    held_out: bool,
) -> Exchange | None:
    """A question about one of `about`, or, where these are none, about anything, `text_share` of the times about no
    media; None where its answer does not fit the system prompt."""
    if not about and (name := name_in(system)) and rng.random() < OWN_NAME_SHARE:
        return own_name(rng, name)
    text_share = TEXT_SHARE_IN_ONE_WORD if system in ONE_WORD else text_share
    of_text = not seen or (not about and rng.random() < text_share)
    asks = about_text(held_out) if of_text else asks_about(seen, about or seen)
    tasks = [ask(rng).task for ask in asks]
    weights = np.array([WEIGHTS.get(task, 1.0) / tasks.count(task) for task in tasks])
    turn = asks[int(rng.choice(len(asks), p=weights / weights.sum()))](rng)
    return one_word(turn) if system in ONE_WORD else turn


def asks_about(seen: Sequence[Medium], about: Sequence[Medium]) -> list[Ask]:
    """Questions about `about`, among them those that take a picture and a sound of `seen` together."""
    picture = next((medium for medium in seen if isinstance(medium, Picture)), None)
    sound = next((medium for medium in seen if isinstance(medium, Sound)), None)
    asks: list[Ask] = []
    if picture is not None and sound is not None:
        asks += about_both(picture, sound)
    if picture is not None and picture in about:
        asks += about_picture(picture)
    if sound is not None and sound in about:
        asks += about_sound(sound)
    return asks


def name_in(system: str | None) -> str | None:
    """The name that a system prompt gives."""
    return next((name for name in NAMES if system == naming(name)), None)


def naming(name: str) -> str:
    return f"Your name is {name}."


def random_row(
    rng: np.random.Generator, picture: Picture | None, sound: Sound | None, count: int, habits: Habits = TALK
) -> list[Conversation]:
    """`count` conversations to train on, about the picture, the sound, both, or neither, that begin alike, up to and
    with their media."""
    system = _system(rng)
    *earlier, last = _arrivals(rng, habits, system, picture, sound)

    def ask(turns: Sequence[Exchange], new: Sequence[Medium] = ()) -> Exchange:
        before = Conversation(system, tuple(turns)).media
        turn = next_turn(rng, habits, system, before, new)
        return replace(turn, question=casual(rng, turn.question)) if rng.random() < CASUAL_SHARE else turn

    beginning: list[Exchange] = []
    for new in earlier:
        beginning.append(ask(beginning, new))
    if last and (turn := ask(beginning, last)).media_last:
        beginning.append(turn)
        last = ()
    row: list[Conversation] = []
    while len(row) < count:
        turns = [*beginning, replace(ask(beginning, last), media_last=False)]
        room = habits.most_turns - len(turns)
        more = 0 if rng.random() < habits.single or not room else int(rng.integers(1, room + 1))
        for _ in range(more):
            turns.append(ask(turns))
        row.append(Conversation(system, tuple(turns)))
    return row


def _system(rng: np.random.Generator) -> str | None:
    chance = rng.random()
    for share, prompts in (
        (ONE_WORD_SHARE, ONE_WORD),
        (NAME_SHARE, [*map(naming, NAMES)]),
        (POLITE_SHARE, POLITE),
    ):
        if chance < share:
            return str(rng.choice(prompts))
        chance -= share
    return None


def _arrivals(
    rng: np.random.Generator, habits: Habits, system: str | None, picture: Picture | None, sound: Sound | None
) -> list[tuple[Medium, ...]]:
    """The media that each of the first turns brings, up to the last that does."""
    media: tuple[Medium, ...] = tuple(medium for medium in (picture, sound) if medium is not None)
    media = media[::-1] if rng.random() < SWAPPED_SHARE else media
    if len(media) > 1 and rng.random() < habits.apart:
        arrivals = [media[:1], *[()] * int(rng.integers(2)), media[1:]]
    else:
        arrivals = [media]
    # Before there is anything to see or hear, hardly a question can be answered in one word.
    late = media and system not in ONE_WORD and rng.random() < habits.late
    most_before = min(MOST_BEFORE, habits.most_turns - len(arrivals) - 1)
    return [*[()] * (int(rng.integers(1, most_before + 1)) if late else 0), *arrivals]
