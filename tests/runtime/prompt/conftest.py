"""A small tokenizer with Gemma's normalizer, byte fallback and control tokens."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, trainers

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]


@pytest.fixture(scope="session")
def small_tokenizer() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL + byte_tokens, show_progress=False)
    backend.train_from_iterator(["the user said hello to the model\nünï � user model"] * 3, trainer)
    data = json.loads(backend.to_str())  # the trainer marks byte tokens as special; in Gemma they are plain
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in SPECIAL]
    return tokenizers.Tokenizer.from_str(json.dumps(data))
