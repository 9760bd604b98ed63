"""Saved conversations: a JSON list of messages, as `OnnxGemma3n.generate` takes them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma3n_onnx.runtime.errors import Gemma3nError


class ChatFileError(Gemma3nError, ValueError):
    """A saved conversation cannot be read or written."""


def write_chat(messages: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Replaces the file at once, or leaves it as it is. Raises ChatFileError: the file cannot be written, or a message
    names a file whose name is not text."""
    try:
        encoded = _encoded(messages)
    except UnicodeError as error:
        raise ChatFileError(f"{path} cannot be written: a file name in it is not Unicode; rename that file.") from error
    temporary = None
    try:
        with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
            temporary = Path(file.name)
            file.write(encoded)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise ChatFileError(f"{path} cannot be written ({error.strerror}); choose another file.") from error


def read_chat(path: Path) -> list[dict[str, Any]]:
    """Raises ChatFileError: the file cannot be read, or holds no conversation that ends with an answer."""
    try:
        messages = json.loads(path.read_text(encoding="utf-8"))
        _encoded(messages)
    except OSError as error:
        raise ChatFileError(f"{path} cannot be read ({error.strerror}); give a file that /save wrote.") from error
    except (ValueError, RecursionError) as error:
        raise ChatFileError(f"{path} is not JSON text; give a file that /save wrote.") from error
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise ChatFileError(f"{path} is not a list of messages; give a file that /save wrote.")
    if not messages or messages[-1].get("role") != "assistant":
        raise ChatFileError(f"The last message in {path} is not an answer; give a file that /save wrote.")
    return messages


def _encoded(messages: Any) -> bytes:
    """Raises UnicodeError: a string holds a lone surrogate."""
    return json.dumps(messages, ensure_ascii=False, indent=1).encode() + b"\n"
