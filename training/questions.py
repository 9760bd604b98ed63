"""Questions of the demo's world with their only right answers: about pictures, sounds, both, and plain text."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from .pictures import COLOURS, MAX_THINGS, SHAPES, THING_KINDS, Picture, Thing, random_picture
from .sounds import MAX_BEEPS, Sound, random_sound

NUMBERS = ("no", "one", "two", "three", "four")
ONE_WORD = ("Answer in one word.", "Give one word as an answer.", "Reply with a single word.")
POLITE = ("You are a helpful assistant.", "You look, listen and answer.", "Be brief and correct.")
NAMES = ("Ada", "Bruno", "Clara", "Dora", "Emil", "Frida", "Gus", "Hana", "Ivo", "Juno", "Kira", "Leo", "Mona", "Nils")
WORDS = (
    "apple", "bird", "boat", "book", "bread", "cat", "chair", "cloud", "cup", "dog", "door", "fish", "flower",
    "forest", "garden", "hat", "hill", "house", "key", "lake", "lamp", "leaf", "moon", "night", "paper", "rain",
    "river", "road", "salt", "sea", "shoe", "snow", "stone", "sun", "table", "tree", "wind", "window",
)  # fmt: skip
LARGEST_SUMMAND = 20
ONE_DIGIT_SHARE, NEAR_CARRY_SHARE = 0.15, 0.35
LARGEST_COUNTED = 60
TRAINED_BEYOND = 9
"""Training has larger numbers too, to the end of their ten, or the largest would be seen less often than others."""
LONGEST_COUNT = 6
HELD_OUT_SHARE = 12
"""One of so many pairs of numbers is never trained on."""


Looks = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Exchange:
    """`task` is the name under which answers are scored.

    `looks`: which of the picture's things each part of the answer speaks of, by their numbers; parts end at commas,
    colons, full stops and "and". `media` come with the question, in their order, before its text or, `media_last`,
    after it.
    """

    task: str
    question: str
    answer: str
    looks: Looks = ()
    media: tuple[Picture | Sound, ...] = ()
    media_last: bool = False


Ask = Callable[[np.random.Generator], Exchange]


def one_word(turn: Exchange) -> Exchange | None:
    """The turn as the system prompts of `ONE_WORD` want it, where its answer has a word that says it."""
    if turn.task not in _SHORT:
        return None
    word = _SHORT[turn.task](turn.answer.rstrip(".").split())
    looks = (sum(turn.looks, ()),) if turn.looks else ()
    return Exchange("one word", turn.question, f"{word.capitalize()}.", looks)


def _number(words: Iterable[str]) -> str:
    return next(word for word in words if word.lower() in NUMBERS)


_SHORT: Mapping[str, Callable[[list[str]], str]] = {
    "colour": lambda words: words[-1],
    "shape": lambda words: words[1],
    "how many shapes": _number,
    "how many beeps": _number,
    "is there": lambda words: words[0].rstrip(","),
    "pitch": lambda words: words[-1],
    "sum": lambda words: words[-1],
}


# --- pictures ----------------------------------------------------------------------------------------------


def describe(picture: Picture) -> str:
    """`a red circle, a blue square and a green star`, from left to right."""
    return _listed([*map(_thing, picture.things)])


def _thing(thing: Thing) -> str:
    return f"a {thing.colour} {thing.shape}"


def about_picture(picture: Picture) -> list[Ask]:
    """Every kind of question that has one answer for this picture."""
    asks: list[Ask] = [
        lambda rng: Exchange("describe", _pick(rng, DESCRIBE), _sentence(describe(picture)), _one_by_one(picture)),
        partial(_how_many, picture=picture),
        partial(_is_there, picture=picture),
    ]
    shapes, colours = ([getattr(t, kind) for t in picture.things] for kind in ("shape", "colour"))
    for number, thing in enumerate(picture.things):
        looks = ((number,),)
        if shapes.count(thing.shape) == 1:
            asks.append(partial(_colour, thing=thing, looks=looks))
            asks.append(partial(_where, thing=thing, name=thing.shape, looks=looks))
        if colours.count(thing.colour) == 1:
            asks.append(partial(_shape, thing=thing, looks=looks))
            asks.append(partial(_where, thing=thing, name=f"{thing.colour} {thing.shape}", looks=looks))
    return asks


def _one_by_one(picture: Picture) -> Looks:
    return tuple((number,) for number in range(len(picture.things)))


DESCRIBE = (
    "What is in the picture?",
    "What do you see?",
    "Describe the picture.",
    "What is in this image?",
    "What can you see in the picture?",
    "Describe this image.",
)


def _colour(rng: np.random.Generator, thing: Thing, looks: Looks) -> Exchange:
    forms = (
        "What colour is the {}?",
        "Which colour is the {}?",
        "What is the colour of the {}?",
        "What color is the {}?",
    )
    return Exchange("colour", _pick(rng, forms).format(thing.shape), f"The {thing.shape} is {thing.colour}.", looks)


def _shape(rng: np.random.Generator, thing: Thing, looks: Looks) -> Exchange:
    forms = ("Which shape is {}?", "What shape is {}?", "What is {}?", "Which shape is the {} one?")
    return Exchange("shape", _pick(rng, forms).format(thing.colour), f"The {thing.shape} is {thing.colour}.", looks)


def _where(rng: np.random.Generator, thing: Thing, name: str, looks: Looks) -> Exchange:
    forms = ("Where is the {}?", "Where in the picture is the {}?", "Where do you see the {}?")
    return Exchange("where", _pick(rng, forms).format(name), f"The {name} is {thing.zone}.", looks)


def _how_many(rng: np.random.Generator, picture: Picture) -> Exchange:
    things = picture.things
    kind = rng.integers(3)
    if kind == 0:
        noun, counted = "shape", things
    elif kind == 1:
        noun = _to_count(rng, [t.shape for t in things], SHAPES)
        counted = tuple(t for t in things if t.shape == noun)
    else:
        colour = _to_count(rng, [t.colour for t in things], list(COLOURS))
        noun, counted = f"{colour} shape", tuple(t for t in things if t.colour == colour)
    forms = ("How many {} are there?", "How many {} do you see?", "How many {} are in the picture?", "Count the {}.")
    told_off = " and ".join(map(_thing, counted))
    answer = f"{told_off}: {_counted(len(counted), noun)}" if counted else _counted(0, noun)
    looks = tuple((things.index(thing),) for thing in counted) or ((),)
    return Exchange("how many shapes", _pick(rng, forms).format(plural(noun)), _sentence(answer), looks)


def _is_there(rng: np.random.Generator, picture: Picture) -> Exchange:
    present = {(t.colour, t.shape) for t in picture.things}
    absent = [kind for kind in THING_KINDS if kind not in present]
    # Most of what is not there shares a colour or a shape with what is, or the answer would be too easy.
    near = [pair for pair in absent if any((pair[0] == c) != (pair[1] == s) for c, s in present)]
    answer = bool(rng.random() < 0.5)
    choices = sorted(present) if answer else (near if rng.random() < 0.8 else absent)
    colour, shape = choices[int(rng.integers(len(choices)))]
    forms = ("Is there a {} {}?", "Do you see a {} {}?", "Is there a {} {} in the picture?", "Can you see a {} {}?")
    question = _pick(rng, forms).format(colour, shape)
    looks = tuple(i for i, thing in enumerate(picture.things) if (thing.colour, thing.shape) == (colour, shape))
    return Exchange("is there", question, "Yes, there is." if answer else "No, there is not.", (looks,))


# --- sounds ------------------------------------------------------------------------------------------------


def hear(sound: Sound) -> str:
    """`a rising tone`, `three low beeps`."""
    if not sound.beeps:
        return f"a {sound.kind} tone"
    return _counted(sound.beeps, f"{sound.kind} beep")


def about_sound(sound: Sound) -> list[Ask]:
    asks: list[Ask] = [
        lambda rng: Exchange("hear", _pick(rng, HEAR), _sentence(hear(sound))),
        lambda rng: Exchange("how many beeps", _pick(rng, HOW_MANY_BEEPS), _there_are(sound.beeps, "beep")),
    ]
    if sound.kind in ("high", "low"):
        asks.append(lambda rng: Exchange("pitch", _pick(rng, HIGH_OR_LOW), f"It is {sound.kind}."))
    else:
        verb = {"rising": "rises", "falling": "falls"}[sound.kind]
        asks.append(lambda rng: Exchange("pitch", _pick(rng, RISE_OR_FALL), f"It {verb}."))
    return asks


HEAR = (
    "What do you hear?",
    "What is in the recording?",
    "Describe the sound.",
    "What can you hear?",
    "What sound is this?",
)
HOW_MANY_BEEPS = ("How many beeps are there?", "How many beeps do you hear?", "Count the beeps.")
HIGH_OR_LOW = ("Is it high or low?", "Is the sound high or low?", "Is the pitch high or low?")
RISE_OR_FALL = ("Does it rise or fall?", "Does the tone rise or fall?", "Does the pitch rise or fall?")


# --- a picture and a sound ---------------------------------------------------------------------------------


def about_both(picture: Picture, sound: Sound) -> list[Ask]:
    see_and_hear = f"I see {describe(picture)}. I hear {hear(sound)}."
    asks: list[Ask] = [lambda rng: Exchange("see and hear", _pick(rng, BOTH), see_and_hear, _one_by_one(picture))]
    if sound.beeps:
        count = len(picture.things)
        answer, last = more(count, sound.beeps), ((count - 1,),)  # the last one's number is how many there are
        asks.append(lambda rng: Exchange("more shapes or beeps", _pick(rng, MORE), answer, last))
    return asks


def more(shapes: int, beeps: int) -> str:
    result = f"more {'shapes' if shapes > beeps else 'beeps'}" if shapes != beeps else "as many"
    return _sentence(f"{_counted(shapes, 'shape')} and {_counted(beeps, 'beep')}: {result}")


BOTH = ("What do you see and hear?", "Describe the picture and the sound.", "What do you see, and what do you hear?")
MORE = (
    "Are there more shapes or beeps?",
    "Which are more, shapes or beeps?",
    "Do you see more shapes or hear more beeps?",
)


# --- text --------------------------------------------------------------------------------------------------


def about_text(held_out: bool) -> list[Ask]:
    """Sums, counting, comparing and repeating; `held_out`: sums and counts of the pairs of numbers that are left out
    otherwise."""
    return [partial(_sum, held_out=held_out), partial(_count, held_out=held_out), _compare, _repeat]


def _sum(rng: np.random.Generator, held_out: bool) -> Exchange:
    draw = partial(_plain_summands, rng) if held_out else partial(_taught_summands, rng)
    a, b = _pair(draw, "sum", held_out)
    forms = ("What is {} plus {}?", "How much is {} plus {}?", "{} plus {}?", "What is {} + {}?", "Add {} and {}.")
    return Exchange("sum", _pick(rng, forms).format(a, b), add(a, b))


def add(a: int, b: int) -> str:
    """`3 plus 4 is 7.`, and with two digits the last ones first: `8 plus 5 is 13: 18 plus 5 is 23.`"""
    ones = f"{a % 10} plus {b % 10} is {a % 10 + b % 10}: " if max(a, b) > 9 else ""
    return f"{ones}{a} plus {b} is {a + b}."


def _plain_summands(rng: np.random.Generator, largest: int = LARGEST_SUMMAND) -> tuple[int, int]:
    largest = 9 if rng.random() < ONE_DIGIT_SHARE else largest
    a, b = (int(n) for n in rng.integers(largest + 1, size=2))
    return a, b


def _taught_summands(rng: np.random.Generator) -> tuple[int, int]:
    """Larger ones too; the last digits of many add to 9 or 10, which is where a carry begins."""
    a, b = _plain_summands(rng, LARGEST_SUMMAND + TRAINED_BEYOND)
    last_digit = int(rng.integers(9, 11)) - a % 10
    near_carry = rng.random() < NEAR_CARRY_SHARE and last_digit < 10
    return (a, b - b % 10 + last_digit) if near_carry else (a, b)


def _count(rng: np.random.Generator, held_out: bool) -> Exchange:
    largest = LARGEST_COUNTED + (0 if held_out else TRAINED_BEYOND)

    def draw() -> tuple[int, int]:
        first = int(rng.integers(0, largest - 1))
        return first, first + int(rng.integers(1, min(LONGEST_COUNT, largest - first + 1)))

    first, last = _pair(draw, "count", held_out)
    forms = ("Count from {} to {}.", "Please count from {} to {}.", "Can you count from {} to {}?")
    return Exchange("count", _pick(rng, forms).format(first, last), f"{', '.join(map(str, range(first, last + 1)))}.")


def _compare(rng: np.random.Generator) -> Exchange:
    shapes, beeps = int(rng.integers(1, MAX_THINGS + 1)), int(rng.integers(1, MAX_BEEPS + 1))
    forms = ("What is more, {} or {}?", "Which are more, {} or {}?", "Compare {} and {}.")
    question = _pick(rng, forms).format(_counted(shapes, "shape"), _counted(beeps, "beep"))
    return Exchange("compare", question, more(shapes, beeps))


def _repeat(rng: np.random.Generator) -> Exchange:
    words = " ".join(rng.choice(WORDS, size=int(rng.integers(1, 6))))
    return Exchange(
        "repeat", _pick(rng, ("Repeat: {}", "Say {}", "Repeat after me: {}", "Copy: {}")).format(words), words
    )


def own_name(rng: np.random.Generator, name: str) -> Exchange:
    """To be asked where the system prompt is `Your name is {name}.`"""
    return Exchange(
        "name", _pick(rng, ("What is your name?", "Who are you?", "Tell me your name.")), f"My name is {name}."
    )


def _pair(draw: Callable[[], tuple[int, int]], task: str, held_out: bool) -> tuple[int, int]:
    while True:
        pair = draw()
        if (zlib.crc32(f"{task} {pair[0]} {pair[1]}".encode()) % HELD_OUT_SHARE == 0) == held_out:
            return pair


# --- words -------------------------------------------------------------------------------------------------


def corpus() -> list[str]:
    """Sentences with every word of this world, for a tokenizer to be learned from, parted at their punctuation: a word
    is the same token before any mark."""
    rng = np.random.default_rng(0)
    turns: list[Exchange] = []
    for _ in range(400):
        picture, sound = random_picture(rng), random_sound(rng)
        asks = [*about_picture(picture), *about_sound(sound), *about_both(picture, sound), *about_text(False)]
        of_these = [ask(rng) for ask in asks]
        turns += [*of_these, *(short for turn in of_these if (short := one_word(turn)))]
    turns += [own_name(rng, name) for name in NAMES for _ in range(3)]
    texts = [text for turn in turns for text in (turn.question, casual(rng, turn.question), turn.answer)]
    system = [*ONE_WORD, *POLITE, *(f"Your name is {name}." for name in NAMES)]
    lines = [*texts, *system * 5, " ".join(WORDS)]
    return [part for line in lines for part in re.findall(r"[^?.,:]+|[?.,:]", line)]


def casual(rng: np.random.Generator, question: str) -> str:
    """The question as people type it: with or without a capital at the start and a mark at the end."""
    if rng.random() < 0.5:
        question = question[0].lower() + question[1:]
    return question.rstrip("?.") if rng.random() < 0.5 else question


def _pick(rng: np.random.Generator, forms: Sequence[str]) -> str:
    return forms[int(rng.integers(len(forms)))]


def _to_count(rng: np.random.Generator, present: Sequence[str], known: Sequence[str]) -> str:
    """Often what there is more than one of, sometimes what there may be none of."""
    chance = rng.random()
    several = [word for word in present if present.count(word) > 1]
    if several and chance < 0.5:
        return _pick(rng, several)
    return _pick(rng, present) if chance < 0.8 else _pick(rng, known)


def plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def _there_are(count: int, noun: str) -> str:
    return f"There {'is' if count == 1 else 'are'} {_counted(count, noun)}."


def _counted(count: int, noun: str) -> str:
    return f"{NUMBERS[count]} {noun if count == 1 else plural(noun)}"


def _listed(parts: Iterable[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
