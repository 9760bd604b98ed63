"""The demo's world: what is drawn and sounded is what the answers say, and an exam asks nothing that was taught."""

import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest

from gemma3n_onnx.training import conversations, exam, questions
from gemma3n_onnx.training.pictures import COLOURS, MAX_THINGS, SHAPES, Picture, random_picture
from gemma3n_onnx.training.sounds import RATE_HZ, Sound, random_sound


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    return [random_picture(rng) for _ in range(count)]


def test_pictures_are_of_every_kind():
    drawn = pictures(300)
    assert {len(p.things) for p in drawn} == set(range(1, MAX_THINGS + 1))
    assert {t.shape for p in drawn for t in p.things} == set(SHAPES)
    assert {t.colour for p in drawn for t in p.things} == set(COLOURS)
    assert len({t.zone for p in drawn for t in p.things}) == 9
    assert min(min(p.width, p.height) for p in drawn) < 160 and max(max(p.width, p.height) for p in drawn) > 900


def test_things_lie_apart_within_the_picture_from_left_to_right():
    for picture in pictures(200):
        shorter = min(picture.width, picture.height)
        assert [t.x for t in picture.things] == sorted(t.x for t in picture.things)
        for thing in picture.things:
            for centre, side in ((thing.x, picture.width), (thing.y, picture.height)):
                assert thing.size * shorter / 2 <= centre * side <= side - thing.size * shorter / 2
        for a, b in itertools.combinations(picture.things, 2):
            apart = math.hypot((a.x - b.x) * picture.width, (a.y - b.y) * picture.height)
            assert apart > (a.size + b.size) * shorter / 2


def test_a_thing_has_its_colour_where_it_lies():
    for picture in pictures(20):
        image, owners = np.asarray(picture.draw().resize((64, 64), 0)), picture.owners(64)
        for number, thing in enumerate(picture.things, start=1):
            assert (owners == number).any()
            far = np.abs(image[owners == number].astype(int) - thing.rgb).max(-1)
            assert np.median(far) <= 2


def test_drawing_and_sounding_are_reproducible():
    rng = np.random.default_rng(3)
    picture, sound = random_picture(rng), random_sound(rng)
    assert picture.draw().tobytes() == picture.draw().tobytes()
    np.testing.assert_array_equal(sound.synthesize()[0], sound.synthesize()[0])


@pytest.mark.parametrize("kind", ["high", "low", "rising", "falling"])
def test_a_tone_has_the_pitch_of_its_kind(kind):
    for seed in range(5):
        samples, [(begin, end)] = Sound(kind, 0, seed).synthesize()
        pitches = [strongest(samples, at) for at in (begin + 0.1, end - 0.1)]
        if kind in ("rising", "falling"):
            assert (pitches[0] < pitches[1]) == (kind == "rising")
        else:
            assert all((pitch > 1000) == (kind == "high") for pitch in pitches)


def strongest(samples, at):
    """Frequency in Hz of the strongest partial around `at` seconds."""
    middle = round(at * RATE_HZ)
    window = samples[middle - 800 : middle + 800] * np.hanning(1600)
    return np.argmax(np.abs(np.fft.rfft(window))) * RATE_HZ / 1600


def test_beeps_are_as_many_as_sound():
    for seed, beeps in itertools.product(range(4), range(1, 6)):
        samples, spans = Sound("low", beeps, seed).synthesize()
        loud = np.sqrt(np.convolve(samples**2, np.ones(320) / 320, "same"))
        active = loud > 0.3 * loud.max()
        assert np.count_nonzero(active[1:] & ~active[:-1]) == beeps == len(spans)


def test_descriptions():
    rng = np.random.default_rng(0)
    picture = random_picture(rng, count=3)
    first, second, third = (f"a {t.colour} {t.shape}" for t in picture.things)
    assert questions.describe(picture) == f"{first}, {second} and {third}"
    assert questions.hear(Sound("rising", 0, 1)) == "a rising tone"
    assert questions.hear(Sound("low", 3, 1)) == "three low beeps"
    assert questions.hear(Sound("high", 1, 1)) == "one high beep"


def test_counts_name_what_is_counted():
    rng, seen = np.random.default_rng(0), set()
    for picture in pictures(60):
        for turn in (ask(rng) for ask in questions.about_picture(picture) * 5):
            if turn.task != "how many shapes":
                continue
            listed, _, result = turn.answer.rstrip(".").rpartition(": ")
            number = questions.NUMBERS.index(result.split()[0].lower())
            things = [picture.things[thing] for part in turn.looks for thing in part]
            noun = result.split()[-1].removesuffix("s").removesuffix("e")
            assert number == len(things) == len(re.findall(r"\b[Aa] ", listed))
            assert all(f"{thing.colour} {thing.shape}" in listed for thing in things)
            assert all(thing.shape.startswith(noun) or noun == "shap" for thing in things)
            assert questions.one_word(turn).answer == f"{questions.NUMBERS[number].capitalize()}."
            assert questions.one_word(turn).looks == (sum(turn.looks, ()),)
            seen.add(number)
    assert seen == set(range(MAX_THINGS + 1))


@pytest.mark.parametrize(
    ("shapes", "beeps", "answer"),
    [
        (1, 1, "One shape and one beep: as many."),
        (3, 2, "Three shapes and two beeps: more shapes."),
        (3, 4, "Three shapes and four beeps: more beeps."),
    ],
)
def test_what_is_more(shapes, beeps, answer):
    assert questions.more(shapes, beeps) == answer


@pytest.mark.parametrize(
    ("a", "b", "answer"),
    [
        (3, 4, "3 plus 4 is 7."),
        (9, 9, "9 plus 9 is 18."),
        (18, 5, "8 plus 5 is 13: 18 plus 5 is 23."),
        (20, 1, "0 plus 1 is 1: 20 plus 1 is 21."),
    ],
)
def test_sums_begin_with_the_last_digits(a, b, answer):
    assert questions.add(a, b) == answer
    assert questions.one_word(questions.Exchange("sum", "", answer)).answer == f"{a + b}."


def test_an_exam_asks_every_task_as_often():
    tasks = exam.exam(0, 12)
    assert len(tasks) == 17
    for task, asked in tasks.items():
        assert len(asked) == 12
        assert all(len(conversation.turns) == 1 and conversation.turns[0].task == task for conversation in asked)
    later = exam.later_exam(0, 4)
    assert list(later) == [exam.LATER.format(task) for task in tasks]
    for task, asked in later.items():
        assert {exam.LATER.format(conversation.turns[-1].task) for conversation in asked} == {task}
        assert len(asked) == 4 and all(2 <= len(c.turns) <= conversations.MOST_TURNS for c in asked)


def trained(count, seed=0):
    """Conversations about a picture and a sound."""
    rng = np.random.default_rng(seed)
    rows = [conversations.random_row(rng, random_picture(rng), random_sound(rng), 2) for _ in range(count)]
    return [conversation for row in rows for conversation in row]


def test_conversations_mix_all_tasks_and_media():
    made = trained(150)
    assert {len(c.turns) for c in made} == set(range(1, conversations.MOST_TURNS + 1))
    before = {next(number for number, turn in enumerate(c.turns) if turn.media) for c in made}
    assert before == set(range(conversations.MOST_BEFORE + 1))
    assert {turn.task for c in made for turn in c.turns[1:]} == set(exam.exam(0, 12))
    brought = [(number, turn) for c in made for number, turn in enumerate(c.turns) if turn.media]
    assert {(turn.media_last, number > 0) for number, turn in brought} == set(
        itertools.product((False, True), repeat=2)
    )
    assert {len(turn.media) for _, turn in brought} == {1, 2}
    after_media = [turn.task for c in made for before, turn in itertools.pairwise(c.turns) if before.media]
    assert {"sum", "count", "compare", "repeat", "name"} <= set(after_media)


def test_nothing_is_asked_about_a_picture_or_a_sound_that_is_yet_to_come():
    rng = np.random.default_rng(1)
    made = [*trained(60), *(exam.held_out_conversation(rng, 6) for _ in range(60))]
    for conversation in made:
        kinds = set()
        for number, turn in enumerate(conversation.turns):
            kinds |= {type(medium) for medium in turn.media}
            seen = any(colour in turn.answer.lower() for colour in COLOURS)
            heard = any(word in turn.answer for word in ("beep", " tone", "rises", "falls", "It is "))
            assert Picture in kinds or not seen, (number, turn)
            assert Sound in kinds or not heard or turn.task == "compare", (number, turn)


def test_media_stand_where_their_turn_has_them():
    picture, sound = pictures(1)[0], random_sound(np.random.default_rng(0))
    turns = (
        questions.Exchange("sum", "1 plus 1?", "1 plus 1 is 2."),
        questions.Exchange("describe", "What do you see?", "A ring.", media=(picture,)),
        questions.Exchange("hear", "What do you hear?", "A tone.", media=(sound,), media_last=True),
    )
    conversation = conversations.Conversation("Be brief and correct.", turns)
    assert conversation.media == (picture, sound)
    said = [
        [part if isinstance(part, str) else part["type"] for part in message["content"]]
        for message in conversations.messages_of(conversation, ["a", "b"])
        if message["role"] == "user"
    ]
    assert said == [["text"], ["image", "text"], ["text", "audio"]]


def test_every_number_of_an_exam_is_counted_as_often_in_training():
    rng = np.random.default_rng(0)
    _, count, *_ = questions.about_text(held_out=False)
    seen = Counter(number for _ in range(6000) for number in count(rng).answer[:-1].split(", "))
    often = [seen[str(number)] for number in range(questions.LONGEST_COUNT, questions.LARGEST_COUNTED + 1)]
    assert min(often) > 0.5 * max(often)


def test_an_exam_asks_no_numbers_that_were_taught():
    rng = np.random.default_rng(0)
    taught = {
        turn.answer
        for conversation in conversations.random_row(rng, None, None, 8_000)
        for turn in conversation.turns
        if turn.task in ("sum", "count")
    }
    asked = [c for tasks in (exam.exam(0, 60), exam.later_exam(0, 10)) for of_task in tasks.values() for c in of_task]
    answers = {turn.answer for c in asked for turn in c.turns if turn.task in ("sum", "count")}
    assert len(answers) > 20
    assert not answers & taught


def test_the_tokenizer_knows_every_word_as_one_token(tmp_path):
    from gemma3n_onnx.runtime.prompt.tokenizer import Tokenizer
    from gemma3n_onnx.training.checkpoint import demo_config, write_companions

    write_companions(tmp_path, demo_config())
    tokenizer = Tokenizer.from_folder(tmp_path)
    for word in (*SHAPES, *COLOURS, *questions.WORDS, *questions.NUMBERS):
        assert len(tokenizer.encode(f" {word}", add_bos=False)) == 1, word
