"""Errors a user can cause. Each is also the builtin type that a Python caller would expect."""

import re
import reprlib
from collections.abc import Callable

LONGEST_MESSAGE = 1000
_END_CHARACTERS = 250


def _shortened(message: str) -> str:
    if len(message) <= LONGEST_MESSAGE:
        return message
    return f"{message[: LONGEST_MESSAGE - _END_CHARACTERS - 3]} … {message[-_END_CHARACTERS:]}"


class Gemma3nError(Exception):
    """Base class of this project's errors; each message is one sentence that says what to do.

    A longer message than `LONGEST_MESSAGE`, which repeats what a stranger sent, loses its middle.

    `option`: the name of a Python option in the message, as `name` or `name=value`.
    """

    def __init__(self, *arguments: object, option: str | None = None) -> None:
        super().__init__(*(_shortened(each) if isinstance(each, str) else each for each in arguments))
        self.option = option

    def spelled(self, spell: Callable[[str, str], str]) -> str:
        """The message for another kind of caller. `spell` writes the option, given its name and its value, which may be
        empty."""
        if self.option is None:
            return str(self)
        name = re.compile(rf"(?<![\w./'\"]){self.option}(?:=\"?(\w+)\"?)?(?!\w|[./]\w)")
        return name.sub(lambda found: spell(self.option or "", found[1] or ""), str(self))


def as_flag(name: str, value: str) -> str:
    """An option as on the command line."""
    flag = f"--{name.replace('_', '-')}"
    return f"{flag} {value}" if value else flag


def shown(value: object) -> str:
    """The repr of a value that a file gives, shortened to fit into a sentence."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 120, 120


class ArtifactError(Gemma3nError, ValueError):
    """The exported folder cannot be used: damaged, incomplete, or of another format version."""


class ArtifactNotFoundError(ArtifactError, FileNotFoundError):
    """There is no exported artifact at the given path."""


class ChatTemplateError(ArtifactError):
    """The chat template, the artifact's or another, is missing, unreadable or not valid Jinja."""


class ProviderError(Gemma3nError, RuntimeError):
    """The execution provider cannot be used, or cannot run this artifact."""


class RuntimeMissingError(ProviderError, ImportError):
    """No usable ONNX Runtime is installed."""


class PromptError(Gemma3nError, ValueError):
    """The prompt or the messages cannot be turned into token ids."""


class ContextLengthError(PromptError):
    """Prompt and requested tokens do not fit into the context."""


class OptionError(Gemma3nError, ValueError):
    """A generation or load option is out of range."""


class MediaError(PromptError):
    """An image, a clip or a video cannot be read, or the model cannot take it."""


class MediaNotFoundError(MediaError, FileNotFoundError):
    """There is no file at the given path, or nothing at the URL."""


class UrlRefusedError(MediaError, PermissionError):
    """The fetch policy does not allow this URL or file."""


class AudioTooLongError(MediaError):
    """The clip is longer than the encoder's context."""


class ClosedError(Gemma3nError, ValueError):
    """The model was closed."""

    def __init__(self) -> None:
        super().__init__("The model is closed; load it again with OnnxGemma3n.from_pretrained.")


class DeadlineError(Gemma3nError, TimeoutError):
    """A request exceeded its deadline."""


class AnswerSchemaError(Gemma3nError, ValueError):
    """The finished answer breaks a part of its constraint that no grammar enforces."""


class PackageMissingError(Gemma3nError, ImportError):
    """An optional package is needed for this input and is not installed."""


def no_template(consequence: str) -> PromptError:
    return PromptError(
        f"This artifact has no chat template, so {consequence}; load it with chat_template=FILE, export it with one "
        "(gemma3n-export --chat-template FILE), or give a raw prompt.",
        option="chat_template",
    )


def no_document(place: str) -> PromptError:
    """`place` says what has the document."""
    return PromptError(
        f"{place}, but the model does not take a PDF or another document; send its text, or each page as an image."
    )


def no_token(largest: float) -> ProviderError:
    return ProviderError(
        f"The largest logit is {largest}, so no token can be chosen; "
        "try another execution provider or another precision."
    )
