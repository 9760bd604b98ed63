"""`OnnxGemma3n`: an artifact, loaded, that answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .artifact import Manifest, load_manifest
from .chat import Chat
from .checks import require_integer
from .engine.encoders import Encoders
from .engine.engine import PREFILL_CHUNK, Engine
from .engine.prefix_cache import PrefixCache
from .engine.providers.base import DeviceOptions
from .engine.providers.select import select_provider
from .errors import ArtifactError, PromptError
from .generation.options import GenerationOptions
from .generation.scheduler import Scheduler, check_context
from .generation.stream import GenerationStream
from .media.fetch import FetchPolicy
from .media.reader import MediaOptions
from .options import read_options
from .prompt.chat_template import ChatTemplate
from .prompt.encoder import PromptEncoder
from .prompt.tokenizer import Tokenizer
from .tokens import PromptTokens

CHAT_TEMPLATE_FILE = "chat_template.jinja"

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


class OnnxGemma3n:
    """A Gemma 3n artifact on ONNX Runtime.

    >>> model = OnnxGemma3n.from_pretrained("gemma-3n-E2B")
    >>> model.generate("The capital of France is", max_new_tokens=8).text
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        engine: Engine,
        encoders: Encoders,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        fetch: FetchPolicy,
        prefix_cache_size: int,
    ) -> None:
        self.folder, self.manifest, self.engine, self.encoders = folder, manifest, engine, encoders
        self.tokenizer, self.template = tokenizer, template
        self.prompts = PromptEncoder(manifest, tokenizer, template, fetch, self._run_encoder)
        self._prefix_cache = PrefixCache(prefix_cache_size) if prefix_cache_size else None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        provider: str = "auto",
        *,
        threads: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        memory_budget: int | None = None,
        fetch: FetchPolicy | None = None,
        prefix_cache_size: int = 1,
        device_id: int = 0,
        gpu_memory_limit: int | None = None,
        cuda_graphs: bool = True,
    ) -> OnnxGemma3n:
        """Loads an exported folder.

        Args:
            provider: "cpu", "cuda", or "auto": CUDA for an artifact made for it where it is installed.
            threads: of ONNX Runtime; None for one for each physical core.
            prefill_chunk: tokens of a prompt that are run at once; less takes less memory.
            memory_budget: bytes that the decoder's weights may take. Those of the faster graph for prompts, as many
                again, are loaded at the first long prompt if they fit in; by default, if twice as much is free.
            fetch: what media may be read from disk and network, and how much of them.
            prefix_cache_size: so many prompts keep their KV caches when they are answered, and what a later one begins
                with alike is not run again; on the CPU only. Their memory goes with `release`.
            device_id: of the GPU, from 0.
            gpu_memory_limit: bytes that ONNX Runtime may take on the GPU for one graph; None is all that is there.
            cuda_graphs: record a decode step once and replay it, which needs no work of the CPU for each operator.

        Raises:
            ArtifactError: the folder is missing, incomplete, damaged or of another version.
            ProviderError: no ONNX Runtime, or one that cannot run this artifact.
            OptionError: an argument is out of range.
        """
        folder = Path(folder)
        manifest = load_manifest(folder)
        chosen = select_provider(provider, manifest, DeviceOptions(device_id, gpu_memory_limit, cuda_graphs))
        tokenizer = Tokenizer.from_folder(folder)
        if (tokens := tokenizer.vocab_size) > manifest.vocab_size:
            raise ArtifactError(
                f"The tokenizer in {folder} has {tokens:,} tokens and the model {manifest.vocab_size:,}, so they "
                "do not belong together; export the artifact again."
            )
        template = _load_template(folder)
        engine = Engine(
            folder,
            manifest,
            chosen,
            threads=threads,
            prefill_chunk=prefill_chunk,
            memory_budget=memory_budget,
        )
        encoders = Encoders(folder, manifest, chosen, threads)
        require_integer("prefix_cache_size", prefix_cache_size, 0)
        return cls(folder, manifest, engine, encoders, tokenizer, template, fetch or FetchPolicy(), prefix_cache_size)

    def generate(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> Any:
        """The answer to a prompt, or a list of them to a batch of prompts of any lengths.

        Args:
            prompt: text, a list of messages `{"role", "content"}`, or token ids; or a list of such. Content is
                text, or parts of type text, image, audio and video, see `MessageReader`.
            options: the fields of `GenerationOptions`, greedy by default, and those of `MediaOptions`.

        Returns:
            A `GenerationResult`, or a list of them in the order of the prompts.

        Raises:
            PromptError: a prompt that cannot be encoded. MediaError: an image, a clip or a video that cannot be
            read. ContextLengthError: a prompt that is too long. OptionError: an option out of range. All are
            raised before any graph is run.
        """
        chosen, media = read_options(options)
        batched = _is_batch(prompt)
        stream = self._stream(prompt if batched else [prompt], chosen, media)
        for _ in stream:
            pass
        return stream.results() if batched else stream.result

    def stream(self, prompt: Prompt, **options: Any) -> GenerationStream:
        """The answer to one prompt as it is made: iterate for pieces of text that are whole characters.

        After the last piece, `result` holds the `GenerationResult`. Arguments and errors as for `generate`.
        """
        if _is_batch(prompt):
            raise PromptError("stream takes one prompt; use generate for a batch.")
        return self._stream([prompt], *read_options(options))

    def _stream(self, prompts: Sequence[Any], options: GenerationOptions, media: MediaOptions) -> GenerationStream:
        encoded = [self.encode(prompt, media) for prompt in prompts]
        longest = max(map(len, encoded))
        check_context(self.manifest.max_context, longest, options.max_new_tokens)
        scheduler = Scheduler(
            self.engine,
            self.tokenizer,
            rows=len(encoded),
            capacity=longest + options.max_new_tokens,
            prefix_cache=self._prefix_cache,
        )
        return GenerationStream(scheduler, encoded, options)

    def chat(self, system: str | None = None) -> Chat:
        """A conversation whose KV cache is kept from turn to turn."""
        return Chat(self.engine, self.prompts, system)

    def release(self, encoder: str | None = None) -> None:
        """Frees the memory of the "vision" or the "audio" encoder, or of both, of the graph for prompts and of the kept
        prompts; graphs load again when needed."""
        self.encoders.release(encoder)
        if encoder is None:
            self.engine.release()
            if self._prefix_cache:
                self._prefix_cache.clear()

    def _run_encoder(self, modality: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.encoders.features(modality, inputs)

    def encode(self, prompt: Any, media: MediaOptions | None = None) -> PromptTokens:
        """Token ids of a prompt in any of its forms, and where its images and clips stand among them."""
        return self.prompts.encode(prompt, media)

    def read(self, messages: Sequence[Mapping[str, Any]], media: MediaOptions) -> list[dict[str, Any]]:
        """Messages as the chat template takes them, their media read."""
        return self.prompts.read(messages, media)


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
    return ChatTemplate(source)
