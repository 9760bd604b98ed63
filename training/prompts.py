"""Conversations as token ids, written as the runtime writes them: its chat template, its soft tokens, its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gemma3n_onnx.runtime.prompt.chat_template import ChatTemplate
from gemma3n_onnx.runtime.prompt.tokenizer import Tokenizer

from .conversations import Conversation, messages_of
from .decoder import Sequences
from .pictures import COLOURS, MAX_THINGS, SHAPES, Picture
from .questions import NUMBERS, Looks, plural

SOFT_TOKENS = {"image": 256, "audio": 188}
NOTHING = 1 << MAX_THINGS
ASKED = NOTHING << 1
"""The first question that its media follow; the next one is the next bit."""


class Tokens(NamedTuple):
    """A conversation. Things of its picture are given as bits: 1 for the first, 2 for the second, 4 for the third, or
    `NOTHING` where there is none, which the first token of all shows.

    ids: up to the last answer's end. targets: for each the one after it where that is part of an answer, else -1.
    named: the things that a word may mean, as `red` every red one, and `star` after it every red star; between media
    that come after their question and its answer, `ASKED`. spoken: those that the answer speaks of next; at the end of
    a part all that it still has to. shows: `ASKED` for the question that is meant by it.
    """

    ids: list[int]
    targets: list[int]
    named: list[int]
    spoken: list[int]
    shows: list[int]


@dataclass(frozen=True)
class LabelledSoftTokens:
    """Of a row's media, in their order. features [n, H]; shows int64 [n], the things seen in each, as bits; counts
    int64 [n], the number of a beep in the token that first hears it, else 0; kept bool [n], whether it is there, or
    leaves a gap in the positions."""

    features: Tensor
    shows: Tensor
    counts: Tensor
    kept: Tensor

    @classmethod
    def plain(cls, features: Tensor) -> LabelledSoftTokens:
        """All are there, and nobody knows what they show."""
        nothing = torch.zeros(len(features), dtype=torch.int64)
        return cls(features, nothing, nothing, nothing == 0)

    @classmethod
    def joined(cls, parts: Sequence[LabelledSoftTokens]) -> LabelledSoftTokens:
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def _bits(things: Iterable[int]) -> int:
    return sum(1 << thing for thing in things) or NOTHING


def _ends_with(ids: Sequence[int], i: int, last: Sequence[int]) -> bool:
    """Whether the tokens up to and with the `i`th end with `last`."""
    return ids[i] == last[-1] and ids[max(i + 1 - len(last), 0) : i + 1] == last


def _of_part(looks: Looks, part: int) -> int:
    return _bits(looks[part]) if part < len(looks) else 0


class ConversationEncoder:
    """Conversations as sequences to be trained on."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_folder(folder)
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        self._template = ChatTemplate(template)
        self._opening = self._tokenizer.encode("<start_of_turn>model\n", add_bos=False)
        self._user = self._tokenizer.encode("<start_of_turn>user", add_bos=False)
        self._end = self._tokenizer.token_id("<end_of_turn>")
        self.soft_ids = torch.tensor([self._tokenizer.token_id(f"<{kind}_soft_token>") for kind in SOFT_TOKENS])
        self._repeats = dict(zip(self.soft_ids.tolist(), SOFT_TOKENS.values()))
        self._numbers = {number: self.word_id(word) for number, word in enumerate(NUMBERS) if number}
        self._ends_part = frozenset(
            token_id for mark in (",", ":", ".", " and") for token_id in self._tokenizer.encode(mark, add_bos=False)
        )
        self._meaning = {
            token_id: word
            for word in (*COLOURS, *SHAPES)
            for form in (f" {word}", word.capitalize(), f" {plural(word)}")
            for token_id in self._tokenizer.encode(form, add_bos=False)[:1]
        }

    def encode(self, conversation: Conversation) -> Tokens:
        answer = {"role": "assistant", "content": conversation.turns[-1].answer}
        text = self._template.render([*messages_of(conversation, conversation.media_kinds), answer], False)
        for kind in SOFT_TOKENS:
            soft = f"<{kind}_soft_token>"
            text = text.replace(soft, f"\n\n<start_of_{kind}>{soft}<end_of_{kind}>\n\n")
        one_each = self._tokenizer.encode(text, add_bos=True)
        ids = [token_id for one in one_each for token_id in [one] * self._repeats.get(one, 1)]
        targets, spoken = [-1] * len(ids), [0] * len(ids)
        turn, part = -1, None
        for i in range(len(ids) - 1):
            if _ends_with(ids, i, self._opening):
                turn, part = turn + 1, 0
            elif part is not None and ids[i] in self._ends_part:
                part += 1
            if part is not None:
                targets[i] = ids[i + 1]
                ends = ids[i + 1] in self._ends_part
                looks = conversation.turns[turn].looks
                spoken[i] = _bits(sum(looks[part + 1 :], ())) if ends and looks else _of_part(looks, part)
                part = None if ids[i + 1] == self._end else part
        length = max(i for i, target in enumerate(targets) if target >= 0) + 1
        ids = ids[:length]
        named, shows = self._named(conversation, ids), [0] * length
        self._mark_questions(conversation, ids, named, shows)
        return Tokens(ids, targets[:length], named, spoken[:length], shows)

    def _mark_questions(
        self, conversation: Conversation, ids: Sequence[int], named: list[int], shows: list[int]
    ) -> None:
        """Marks in `shows` each question that its media follow, and in `named` what lies between these and the
        answer."""
        starts = [i + 1 for i in range(len(ids)) if _ends_with(ids, i, self._user)]
        answers = [i + 1 for i in range(len(ids)) if _ends_with(ids, i, self._opening)]
        asked = ASKED
        for turn, start, answer in zip(conversation.turns, starts, answers, strict=True):
            if turn.media_last:
                soft = [i for i in range(start, answer) if ids[i] in self._repeats]
                shows[start : soft[0]] = [asked] * (soft[0] - start)
                named[soft[-1] + 1 : answer] = [asked] * (answer - soft[-1] - 1)
                asked <<= 1

    def _named(self, conversation: Conversation, ids: Sequence[int]) -> list[int]:
        pictures = [medium for medium in conversation.media if isinstance(medium, Picture)]
        if not pictures:
            return [0] * len(ids)
        things = pictures[0].things

        def meant(before: str | None, word: str | None) -> int:
            if word is None:
                return 0
            kind = {before, word} if before in COLOURS and word in SHAPES else {word}
            return _bits(i for i, thing in enumerate(things) if kind <= {thing.colour, thing.shape})

        words = [self._meaning.get(token_id) for token_id in ids]
        return [meant(before, word) for before, word in zip([None, *words], words)]

    def word_id(self, word: str) -> int:
        """The id of a word within a sentence, which is one token."""
        (token_id,) = self._tokenizer.encode(f" {word}", add_bos=False)
        return token_id

    def batch(self, rows: Sequence[Sequence[Conversation]], soft_tokens: Sequence[LabelledSoftTokens]) -> Sequences:
        """A batch of rows of conversations that begin alike, up to and with their media, with `soft_tokens` of each.
        The shortest row comes first.

        The targets of beeps are the words for their numbers: who counts along can say how many there were.
        """
        pairs = [(self._pack(row, soft), soft) for row, soft in zip(rows, soft_tokens)]
        packed, soft_tokens = zip(*sorted(pairs, key=lambda pair: len(pair[0][0])))
        length = len(packed[-1][0])
        ids, targets, named, spoken, shows, branches, positions = (
            torch.stack([F.pad(torch.tensor(column), (0, length - len(column)), value=filler) for column in of_rows])
            for of_rows, filler in zip(zip(*packed), (0, -1, 0, 0, 0, -1, 0))
        )
        features = torch.cat([soft.features[soft.kept] for soft in soft_tokens])
        return Sequences(ids, targets, named, spoken, shows, branches, positions, features)

    def _pack(self, row: Sequence[Conversation], soft: LabelledSoftTokens) -> list[list[int]]:
        """The columns of `Tokens`, branches and positions."""
        encoded = [self.encode(conversation) for conversation in row]
        first = encoded[0]
        shared = self._beginning([tokens.ids for tokens in encoded])
        flags, shown, counts = (iter(column.tolist()) for column in (soft.kept, soft.shows, soft.counts))
        shows = [
            next(shown) if token_id in self._repeats else question
            for token_id, question in zip(first.ids[:shared], first.shows)
        ]
        targets = [
            self._numbers.get(next(counts), -1) if token_id in self._repeats else target
            for token_id, target in zip(first.ids[:shared], first.targets)
        ]
        shows[0] = NOTHING
        positions = [i for i in range(shared) if first.ids[i] not in self._repeats or next(flags)]
        beginning = first._replace(targets=targets, shows=shows)
        columns = [[column[i] for i in positions] for column in beginning]
        branches = [0] * len(positions)
        for number, tokens in enumerate(encoded, start=1):
            added = len(tokens.ids) - shared
            for column, more in zip(columns, tokens):
                column.extend(more[shared:])
            branches += [number] * added
            positions += range(shared, len(tokens.ids))
        return [*columns, branches, positions]

    def _beginning(self, row: Sequence[list[int]]) -> int:
        """Tokens that all conversations of a row begin with; all of its media are among them."""
        shared = next((i for i, ids in enumerate(zip(*row)) if len(set(ids)) > 1), min(map(len, row)))
        if any(token_id in self._repeats for ids in row for token_id in ids[shared:]):
            raise ValueError("the conversations of a row begin differently")
        return shared
