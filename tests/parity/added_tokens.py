"""Grows a vocabulary as users of transformers do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from support import save_as_transformers

ADDED = ("<think>", "</think>", "Donaudampfschiff")
FIRST_ADDED = 1280  # the vocabulary of the tiny checkpoints


def resize(model: PreTrainedModel, count: int) -> None:
    """Also resizes the per-layer embeddings."""
    model.resize_token_embeddings(count)


def resize_token_table(model: PreTrainedModel, count: int) -> None:
    """As transformers 4 did, which left the per-layer embeddings as they were."""
    PreTrainedModel.resize_token_embeddings(model, count)


def grow(model: PreTrainedModel, checkpoint: Path, folder: Path, resized: Callable[[Any, int], None] = resize) -> Path:
    """Saves the model of `checkpoint` with the tokens `ADDED`, whose rows are drawn like the others."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.add_tokens([*ADDED]) == len(ADDED)
    tables = model.get_input_embeddings(), model.get_decoder().embed_tokens_per_layer
    before = [(len(table.weight), float(table.weight.std())) for table in tables]
    torch.manual_seed(0)
    resized(model, len(tokenizer))
    tables = model.get_input_embeddings(), model.get_decoder().embed_tokens_per_layer
    with torch.no_grad():
        for table, (rows, std) in zip(tables, before):
            table.weight[rows:].normal_(0, std)
    save_as_transformers(model, checkpoint, folder)
    tokenizer.save_pretrained(folder)
    return folder
