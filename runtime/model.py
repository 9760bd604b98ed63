"""`OnnxGemma3n`: an artifact, loaded, that answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .answer import Answer, generation_options
from .artifact import Manifest, load_manifest
from .chat import Chat
from .engine import PREFILL_CHUNK, Engine
from .errors import ArtifactError, PromptError
from .prompt import ChatTemplate, Tokenizer, encode_prompt
from .session import choose_profile

CHAT_TEMPLATE_FILE = "chat_template.jinja"

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


class OnnxGemma3n:
    """A Gemma 3n artifact on ONNX Runtime.

    >>> model = OnnxGemma3n.from_pretrained("gemma-3n-E2B")
    >>> model.generate("The capital of France is", max_new_tokens=8).text
    """

    def __init__(self, manifest: Manifest, engine: Engine, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self.manifest, self.engine, self.tokenizer, self.template = manifest, engine, tokenizer, template

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        provider: str = "auto",
        *,
        threads: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> OnnxGemma3n:
        """Loads an exported folder.

        Args:
            provider: "cpu", "cuda", or "auto": CUDA for an artifact made for it where it is installed.
            threads: of ONNX Runtime; None for one for each physical core.
            prefill_chunk: tokens of a prompt that are run at once; less takes less memory.

        Raises:
            ArtifactError: the folder is missing, incomplete, damaged or of another version.
            ProviderError: no ONNX Runtime, or one that cannot run this artifact.
            OptionError: an argument is out of range.
        """
        folder = Path(folder)
        manifest = load_manifest(folder)
        profile = choose_profile(provider, manifest)
        tokenizer = Tokenizer.from_folder(folder)
        if (tokens := tokenizer.vocab_size) > manifest.vocab_size:
            raise ArtifactError(
                f"The tokenizer in {folder} has {tokens:,} tokens and the model {manifest.vocab_size:,}, so they "
                "do not belong together; export the artifact again."
            )
        template = _load_template(folder)
        engine = Engine(folder, manifest, profile, threads=threads, prefill_chunk=prefill_chunk)
        return cls(manifest, engine, tokenizer, template)

    def generate(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> Any:
        """The answer to a prompt, or a list of them to a batch of prompts of any lengths.

        Args:
            prompt: text, a list of messages `{"role", "content"}`, or token ids; or a list of such.
            options: the fields of `GenerationOptions`; greedy by default.

        Returns:
            A `GenerationResult`, or a list of them in the order of the prompts.

        Raises:
            PromptError: a prompt that cannot be encoded. ContextLengthError: one that is too long.
            OptionError: an option out of range. All are raised before any work is done.
        """
        chosen = generation_options(options)
        batched = _is_batch(prompt)
        encoded = [self.encode(p) for p in (prompt if batched else [prompt])]
        answer = Answer(self.engine, self.tokenizer, encoded, chosen)
        for _ in answer:
            pass
        return answer.results() if batched else answer.results()[0]

    def stream(self, prompt: Prompt, **options: Any) -> Answer:
        """The answer to one prompt as it is made: iterate for pieces of text that are whole characters.

        After the last piece, `result` holds the `GenerationResult`. Arguments and errors as for `generate`.
        """
        if _is_batch(prompt):
            raise PromptError("stream takes one prompt; use generate for a batch.")
        return Answer(self.engine, self.tokenizer, [self.encode(prompt)], generation_options(options))

    def chat(self, system: str | None = None) -> Chat:
        """A conversation whose KV cache is kept from turn to turn."""
        return Chat(self, system)

    def encode(self, prompt: Any) -> list[int]:
        """Token ids of a prompt in any of its forms."""
        return encode_prompt(prompt, self.tokenizer, self.template, self.manifest.vocab_size)


def _is_batch(prompt: Any) -> bool:
    """A list of prompts, as opposed to one prompt that is a list of messages or of token ids."""
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], str | list | tuple)


def _load_template(folder: Path) -> ChatTemplate | None:
    path = folder / CHAT_TEMPLATE_FILE
    if not path.is_file():
        return None
    try:
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not UTF-8 text; export the artifact again.") from error
    return ChatTemplate(source, {"bos_token": "<bos>", "eos_token": "<eos>"})
