"""The chat template that an artifact gets."""

from __future__ import annotations

from pathlib import Path

from gemma3n_onnx.runtime.prompt.chat_template import ChatTemplate

from .checkpoint.checkpoint import Checkpoint


def choose_chat_template(checkpoint: Checkpoint, file: Path | None) -> str | None:
    """Jinja source of the given file, else of the checkpoint's template; None without either.

    Raises:
        ChatTemplateError: the template cannot be read, compiled, or rendered within its limits. CheckpointError: the
            checkpoint's is not text.
    """
    if file is not None:
        template = ChatTemplate.from_file(file)
    elif (source := checkpoint.chat_template()) is not None:
        template = ChatTemplate(source, f"The chat template of {checkpoint.folder}")
    else:
        return None
    template.check_limits()
    return template.source
