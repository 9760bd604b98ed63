"""Trains a small tokenizer like Gemma's: BPE with byte fallback, spaces as U+2581, the same special tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from gemma3n_onnx.export.writer import write_json

SPACE = "▁"
PAD, EOS, BOS, UNK, MASK = 0, 1, 2, 3, 4
START_OF_TURN, END_OF_TURN = 105, 106
NEWLINES = range(107, 138)  # runs of 1 to 31 newlines
BYTES = range(238, 494)
FIRST_LEARNED = BYTES.stop
SOFT_IDS = 128  # ids of each modality above the text ids
GEMMA_START_OF_IMAGE = 255_999
SMALLEST_TEXT_VOCAB = 1024


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the multimodal special tokens; text special tokens have the same ids in every vocabulary."""

    start_of_image: int
    start_of_audio: int
    end_of_image: int
    image_soft_token: int
    end_of_audio: int
    audio_soft_token: int

    @classmethod
    def of_text_vocab(cls, text_vocab: int) -> SpecialIds:
        """The start tokens have Gemma's ids, or the last two ids of a smaller `text_vocab`."""
        start = GEMMA_START_OF_IMAGE if text_vocab > GEMMA_START_OF_IMAGE + 1 else text_vocab - 2
        audio = text_vocab + SOFT_IDS
        return cls(start, start + 1, text_vocab, text_vocab + 1, audio, audio + 1)

    def tokens(self) -> dict[str, int]:
        """`{content: id}` of all special tokens."""
        return {
            "<pad>": PAD,
            "<eos>": EOS,
            "<bos>": BOS,
            "<unk>": UNK,
            "<mask>": MASK,
            "<start_of_turn>": START_OF_TURN,
            "<end_of_turn>": END_OF_TURN,
            **{f"<{name}>": token_id for name, token_id in vars(self).items()},
        }


def write_tokenizer(folder: Path, text_vocab: int, vocab_size: int, corpus: Iterable[str] | None = None) -> None:
    """Writes tokenizer.json, tokenizer_config.json, generation_config.json and chat_template.jinja.

    Args:
        folder: an existing folder.
        text_vocab: number of ids for text, at least 1024.
        vocab_size: total number of ids; each decodes to text.
        corpus: lines of text to learn the merges from; None for the text in this package.
    """
    special = SpecialIds.of_text_vocab(text_vocab).tokens()
    lines = _prose() if corpus is None else corpus
    _build(text_vocab, vocab_size, special, lines).save(str(folder / "tokenizer.json"), pretty=False)
    write_json(folder / "tokenizer_config.json", _tokenizer_config())
    write_json(folder / "generation_config.json", _generation_config())
    template = resources.files(__package__).joinpath("chat_template.jinja").read_bytes()
    (folder / "chat_template.jinja").write_bytes(template)


def _prose() -> list[str]:
    return resources.files(__package__).joinpath("corpus.txt").read_text(encoding="utf-8").splitlines()


def _build(text_vocab: int, vocab_size: int, special: dict[str, int], corpus: Iterable[str]) -> Tokenizer:
    newlines = {"\n" * (1 + i): token_id for i, token_id in enumerate(NEWLINES)}
    byte_tokens = {f"<0x{i:02X}>": token_id for i, token_id in enumerate(BYTES)}
    vocab = special | newlines | byte_tokens
    taken = set(vocab.values())
    free = [token_id for token_id in range(FIRST_LEARNED, text_vocab) if token_id not in taken]
    pieces, merges = _learn(len(free), corpus)
    vocab |= dict(zip(pieces, free))
    taken.update(vocab.values())
    unused = (token_id for token_id in range(vocab_size) if token_id not in taken)
    vocab |= {f"<unused{i}>": token_id for i, token_id in enumerate(unused)}

    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(run, normalized=False) for run in newlines])
    return tokenizer


def _learn(size: int, corpus: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """At most `size` pieces learned from the corpus, in order of id, and the merges that form them."""
    lines = (line.replace(" ", SPACE) for line in corpus)
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(SPACE, "merged_with_next"),
        ]
    )
    learner.train_from_iterator(lines, BpeTrainer(vocab_size=size, show_progress=False))
    state: dict[str, Any] = json.loads(learner.to_str())["model"]
    pieces = sorted(state["vocab"], key=state["vocab"].__getitem__)
    return pieces, [tuple(merge) for merge in state["merges"]]


def _tokenizer_config() -> dict[str, Any]:
    modal = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "audio_token": "<audio_soft_token>",
        "boa_token": "<start_of_audio>",
        "eoa_token": "<end_of_audio>",
    }
    return {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
        "extra_special_tokens": modal,
        **modal,
    }


def _generation_config() -> dict[str, Any]:
    return {
        "bos_token_id": BOS,
        "eos_token_id": [EOS, END_OF_TURN],
        "pad_token_id": PAD,
        "do_sample": True,
        "top_k": 64,
        "top_p": 0.95,
    }
