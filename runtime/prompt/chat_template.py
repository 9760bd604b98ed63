"""Renders messages to prompt text with a checkpoint's chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import jinja2
from jinja2 import meta
from jinja2.ext import Extension

from gemma3n_onnx.runtime.errors import ChatTemplateError, PromptError

from .template_sandbox import MAX_SOURCE, BoundedEnvironment, LimitError, render_bounded
from .tokenizer import BOS_TOKEN, EOS_TOKEN

_SAMPLE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
_LONGEST_REASON = 500
_LONGEST_DATE = 100


class _GenerationBlock(Extension):
    """`{% generation %}` marks the text to train on; in a prompt, only its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > _LONGEST_DATE:
        raise jinja2.TemplateError(f"a date format has at most {_LONGEST_DATE} characters")
    return datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON without the HTML escaping of jinja2's own filter."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


class ChatTemplate:
    """A checkpoint's chat template: sandboxed jinja2 with Hugging Face's extensions."""

    def __init__(self, source: str, name: str = "The chat template") -> None:
        """ChatTemplateError: the template is empty or not valid jinja2; `name` is how the message calls it."""
        if not source.strip():
            raise ChatTemplateError(f"{name} is empty; give another one.")
        self.source, self.name = source, name
        if len(source) > MAX_SOURCE:
            raise ChatTemplateError(f"{name} has more than {MAX_SOURCE:,} characters; give another one.")
        environment = BoundedEnvironment({"tojson": _to_json}, ["jinja2.ext.loopcontrols", _GenerationBlock])
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            self.reads_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        except Exception as error:  # Python's compiler of the template's code can raise, too
            raise ChatTemplateError(f"{name} is not valid Jinja ({error}); correct it, or give another one.") from error

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """ChatTemplateError: there is no such file, or it is not UTF-8 text or not valid jinja2."""
        try:
            return cls(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise ChatTemplateError(f"{path} is not UTF-8 text; give a chat template in UTF-8.") from error
        except OSError as error:
            raise ChatTemplateError(
                f"The chat template {path} cannot be read ({error.strerror}); give the path of a Jinja file."
            ) from error

    def check_limits(self) -> None:
        """Raises ChatTemplateError if the template runs too long or makes too much even for a short conversation."""
        try:
            self.render(_SAMPLE)
        except PromptError as error:  # a template may reject these roles or this content
            if isinstance(error.__cause__, LimitError):
                raise ChatTemplateError(
                    f"{self.name} cannot be used: {error.__cause__} for a conversation of two words; give another one."
                ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Prompt text of messages from `MessageReader.read`; by default ends where the model's turn starts.

        `tools`: functions as JSON schemas, for a template that `reads_tools`. `variables`: other ones of the template.

        PromptError: the template rejects them, for example because roles do not alternate.
        """
        try:
            return render_bounded(
                self._template,
                {
                    **(variables or {}),
                    "messages": messages,
                    "add_generation_prompt": add_generation_prompt,
                    "tools": tools or None,
                    "documents": None,
                    "bos_token": BOS_TOKEN,
                    "eos_token": EOS_TOKEN,
                },
            )
        except Exception as error:  # template expressions can raise anything
            reason = re.sub(r"\s+", " ", str(error)).strip().rstrip(".")[:_LONGEST_REASON]
            raise PromptError(f"The chat template rejects these messages: {reason}.") from error
