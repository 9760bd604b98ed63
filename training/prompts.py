"""Conversations as token ids, written as the runtime writes them: its chat template, its soft tokens, its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from gemma3n_onnx.runtime.prompt import ChatTemplate, Tokenizer

from .conversations import Conversation, messages_of
from .decoder import Sequences

SOFT_TOKENS = {"image": 256, "audio": 188}


class Encoder:
    """Conversations as sequences to be trained on."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_folder(folder)
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        self._template = ChatTemplate(template, {"bos_token": "<bos>"})
        self._opening = self._tokenizer.encode("<start_of_turn>model\n", add_bos=False)
        self._end = self._tokenizer.token_id("<end_of_turn>")
        self.soft_ids = torch.tensor([self._tokenizer.token_id(f"<{kind}_soft_token>") for kind in SOFT_TOKENS])
        self._soft = frozenset(self.soft_ids.tolist())

    def encode(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Ids up to the last answer's end, and for each the one after it where that is part of an answer, else -1."""
        answer = {"role": "assistant", "content": conversation.turns[-1].answer}
        text = self._template.render([*messages_of(conversation, conversation.media_kinds), answer], False)
        for kind, count in SOFT_TOKENS.items():
            soft = f"<{kind}_soft_token>"
            text = text.replace(soft, f"\n\n<start_of_{kind}>{soft * count}<end_of_{kind}>\n\n")
        ids = self._tokenizer.encode(text, add_bos=True)
        targets = [-1] * len(ids)
        answering, opening = False, len(self._opening)
        for i in range(len(ids) - 1):
            answering = answering or ids[max(i + 1 - opening, 0) : i + 1] == self._opening
            if answering:
                targets[i] = ids[i + 1]
                answering = ids[i + 1] != self._end
        length = max(i for i, target in enumerate(targets) if target >= 0) + 1
        return ids[:length], targets[:length]

    def word_id(self, word: str) -> int:
        """The id of a word within a sentence, which is one token."""
        (token_id,) = self._tokenizer.encode(f" {word}", add_bos=False)
        return token_id

    def batch(
        self, rows: Sequence[Sequence[Conversation]], features: Tensor, kept: Sequence[Tensor] | None = None
    ) -> Sequences:
        """A batch of rows of conversations that begin alike, up to and with their media.

        `features` [n, H] of all images and clips, in the order of the rows. `kept`: of each row's soft tokens, bool
        [count], which are there; the others leave a gap in the positions. `features` are those of the kept.
        """
        packed = [self._pack(row, None if kept is None else kept[i]) for i, row in enumerate(rows)]
        length = max(len(ids) for ids, *_ in packed)
        columns = (
            [F.pad(torch.tensor(part), (0, length - len(part)), value=filler) for part in parts]
            for parts, filler in zip(zip(*packed), (0, -1, -1, 0))
        )
        ids, targets, branches, positions = map(torch.stack, columns)
        return Sequences(ids, targets, branches, positions, features)

    def _pack(
        self, row: Sequence[Conversation], kept: Tensor | None
    ) -> tuple[list[int], list[int], list[int], list[int]]:
        """Ids, targets, branches and positions."""
        encoded = [self.encode(conversation) for conversation in row]
        shared = self._beginning(encoded[0][0])
        ids, targets = encoded[0][0][:shared], encoded[0][1][:shared]
        positions = list(range(shared))
        if kept is not None:
            flags = iter(kept.tolist())
            positions = [i for i in positions if ids[i] not in self._soft or next(flags)]
            ids, targets = [ids[i] for i in positions], [targets[i] for i in positions]
        branches = [0] * len(positions)
        for number, (of_branch, wanted) in enumerate(encoded, start=1):
            if of_branch[:shared] != encoded[0][0][:shared]:
                raise ValueError("the conversations of a row begin differently")
            ids += of_branch[shared:]
            targets += wanted[shared:]
            branches += [number] * (len(of_branch) - shared)
            positions += range(shared, len(of_branch))
        return ids, targets, branches, positions

    def _beginning(self, ids: Sequence[int]) -> int:
        """Tokens up to the last of the media, or none."""
        return max((i + 1 for i, token_id in enumerate(ids) if token_id in self._soft), default=0)
