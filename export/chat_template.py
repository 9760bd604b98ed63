"""The chat template that an artifact gets."""

from __future__ import annotations

from pathlib import Path

from gemma3n_onnx.runtime.prompt.chat_template import ChatTemplate

from .checkpoint.checkpoint import Checkpoint


def choose_chat_template(checkpoint: Checkpoint, file: Path | None) -> str | None:
    """Jinja source of the given file, else of the checkpoint's template; None without either.

    Raises:
        ChatTemplateError: the template cannot be read or compiled. CheckpointError: the checkpoint's is not text.
    """
    if file is not None:
        return ChatTemplate.from_file(file).source
    source = checkpoint.chat_template()
    if source is not None:
        ChatTemplate(source, f"The chat template of {checkpoint.folder}")
    return source
