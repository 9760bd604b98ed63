"""The special token ids of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from gemma3n_onnx.export.errors import CheckpointError

from .checkpoint import Checkpoint


@dataclass(frozen=True)
class TokenIds:
    bos: int
    pad: int
    eos: tuple[int, ...]


def token_ids(checkpoint: Checkpoint) -> TokenIds:
    """The ids from `generation_config.json`, else from `config.json`."""
    text = checkpoint.config.get("text_config", checkpoint.config)
    values = {key: text.get(key) for key in ("bos_token_id", "pad_token_id", "eos_token_id")}
    values |= {k: v for k, v in checkpoint.generation_config().items() if k in values and v is not None}
    vocab = checkpoint.text_config.vocab_size
    for key, value in values.items():
        if value is None:
            raise CheckpointError(f"Neither generation_config.json nor config.json gives {key}; add it.")
        for token_id in value if key == "eos_token_id" and isinstance(value, list) else [value]:
            if type(token_id) is not int or not 0 <= token_id < vocab:
                raise CheckpointError(
                    f"The {key} of the checkpoint's configs is {value!r}, but token ids are from 0 to "
                    f"{vocab - 1}; download generation_config.json again."
                )
    eos = values["eos_token_id"]
    return TokenIds(
        bos=values["bos_token_id"],
        pad=values["pad_token_id"],
        eos=tuple(eos) if isinstance(eos, list) else (eos,),
    )
