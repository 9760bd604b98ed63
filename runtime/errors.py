"""Errors a user can cause. Each is also the builtin type that a Python caller would expect."""


class Gemma3nError(Exception):
    """Base of every error of this project; its message is one sentence that says what to do."""


class ArtifactError(Gemma3nError, ValueError):
    """The exported folder cannot be used: damaged, incomplete, or of another format version."""


class ArtifactNotFoundError(ArtifactError, FileNotFoundError):
    """There is no exported artifact at the given path."""


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
