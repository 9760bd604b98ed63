"""`OnnxGemma3n`: a loaded artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self, overload

import numpy as np

from .artifact import CHAT_TEMPLATE_FILE, Manifest, load_manifest
from .chat import Chat
from .checks import require_integer
from .constraints.options import ConstraintReader
from .engine.encoders import Encoders
from .engine.engine import PREFILL_CHUNK, Engine
from .engine.prefix_cache import PrefixCache
from .engine.providers.base import DeviceOptions
from .engine.providers.select import select_provider
from .errors import ArtifactError, PromptError
from .generation.async_stream import AsyncGenerationStream
from .generation.defaults import GENERATION_CONFIG, SamplingDefaults
from .generation.likelihood import LogLikelihood, token_logprobs
from .generation.result import GenerationResult
from .generation.scheduler import Scheduler, check_context
from .generation.stream import GenerationStream
from .hub import find_artifact
from .media.fetch import FetchPolicy
from .media.reader import MediaOptions
from .options import OptionReader, read_media_options
from .prompt.chat_template import ChatTemplate
from .prompt.encoder import PromptEncoder, RawMedia, TemplateOptions
from .prompt.tokenizer import Tokenizer, encode_plain
from .tokens import PromptTokens

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


class OnnxGemma3n:
    """A Gemma 3n artifact on ONNX Runtime.

    Load a folder that `gemma3n-export` wrote, and ask:

    >>> model = OnnxGemma3n.from_pretrained("gemma-3n-E2B")
    >>> model.generate([{"role": "user", "content": "What is 3 plus 4?"}]).text
    '3 plus 4 is 7.'

    A string is continued as it is, without the chat template; a list of prompts is a batch:

    >>> model.generate("The capital of France is", max_new_tokens=8).text
    >>> [answer.text for answer in model.generate(["One, two,", "Red, green,"], max_new_tokens=4)]

    Images, clips and videos are parts of a message, as paths, URLs, bytes or arrays. In a text prompt, soft tokens
    stand for images and clips given beside it:

    >>> picture = {"type": "image", "image": "photo.jpg"}
    >>> model.generate([{"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]}]).text
    >>> model.generate("<image_soft_token> in this image, there is", images=["photo.jpg"]).text

    Stream pieces of text, or hold a conversation whose KV cache is kept from turn to turn:

    >>> for piece in model.stream("Once upon a time", temperature=0.8, max_new_tokens=64):
    ...     print(piece, end="", flush=True)
    >>> chat = model.chat("You answer in one sentence.")
    >>> chat.send("Who wrote Hamlet?").text
    >>> chat.send("When?", max_new_tokens=32).text

    In asyncio, `agenerate` and `astream` do the same without blocking the event loop. An answer can be held to a form:

    >>> model.generate(prompt, json_schema={"type": "object", "properties": {"sum": {"type": "integer"}}}).text

    Several threads may use a model. The steps of their answers take turns, so a batch, or the server, is faster.
    `close`, or the end of `with OnnxGemma3n.from_pretrained(...) as model:`, frees the memory.

    A `GenerationResult` also has token ids, log-probabilities if requested, the finish reason and timings. Every
    error that a caller can cause is a `Gemma3nError` whose message says what to do.
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
        sampling: SamplingDefaults,
    ) -> None:
        self.folder, self.manifest, self.engine, self.encoders = folder, manifest, engine, encoders
        self.tokenizer, self.template = tokenizer, template
        self.prompts = PromptEncoder(manifest, tokenizer, template, fetch, encoders)
        self.sampling = sampling
        """The checkpoint's sampling values, which `sampling="default"` takes."""
        self.options = OptionReader(sampling, ConstraintReader(folder, manifest))
        self._prefix_cache = PrefixCache(prefix_cache_size) if prefix_cache_size else None

    def __repr__(self) -> str:
        m = self.manifest
        return (
            f"<OnnxGemma3n {str(self.folder)!r}: {m.slice} of {m.source}, {m.precision}, {', '.join(m.modalities)}, "
            f"on {self.engine.provider.name}>"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model's memory, that of its chats apart. Other calls then raise ClosedError."""
        with self.engine.turns:
            self.release()
            self.encoders.close()
            self.engine.close()

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
        chat_template: str | Path | None = None,
        prefix_cache_size: int = 1,
        device_id: int = 0,
        gpu_memory_limit: int | None = None,
        cuda_graphs: bool = True,
        revision: str | None = None,
    ) -> OnnxGemma3n:
        """Loads an exported folder, or downloads an artifact of the Hugging Face Hub and loads it.

        Args:
            folder: an exported folder, else a Hub id ("owner/name"), see `hub.find_artifact`.
            provider: "cpu", "cuda", or "auto": CUDA if the artifact targets it and it is installed, else the CPU.
            threads: of ONNX Runtime; None for one per physical core.
            prefill_chunk: prompt tokens prefilled at once; smaller chunks use less memory.
            memory_budget: bytes for the decoder's weights. The prefill graph, which doubles them, is loaded at the
                first long prompt if it fits; by default, if twice its size is free.
            fetch: which files and URLs media may come from, and their size limits.
            chat_template: path of a Jinja file to use instead of the artifact's chat template.
            prefix_cache_size: prompts whose KV caches are kept for prefix reuse, on the CPU only; `release` frees them.
            device_id: index of the GPU, from 0.
            gpu_memory_limit: bytes of GPU memory for each graph; None is no limit.
            cuda_graphs: capture the decode step as a CUDA graph and replay it.
            revision: branch, tag or commit of a Hub id.

        Raises:
            ArtifactError: the folder is missing, incomplete, damaged or of another version, or cannot be downloaded.
            PackageMissingError: a Hub id without huggingface_hub.
            ProviderError: no ONNX Runtime, or one that cannot run this artifact.
            OptionError: an argument is out of range.
        """
        folder = find_artifact(folder, revision)
        manifest = load_manifest(folder)
        chosen = select_provider(provider, manifest, DeviceOptions(device_id, gpu_memory_limit, cuda_graphs))
        tokenizer = Tokenizer.from_folder(folder)
        if (tokens := tokenizer.vocab_size) > manifest.vocab_size:
            raise ArtifactError(
                f"The tokenizer in {folder} has {tokens:,} tokens, but the model's vocabulary has "
                f"{manifest.vocab_size:,}; export the artifact again."
            )
        template = None
        if chat_template is not None or CHAT_TEMPLATE_FILE in manifest.files:
            template = ChatTemplate.from_file(Path(chat_template or folder / CHAT_TEMPLATE_FILE))
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
        return cls(
            folder,
            manifest,
            engine,
            encoders,
            tokenizer,
            template,
            fetch or FetchPolicy(),
            prefix_cache_size,
            SamplingDefaults.from_folder(folder) if GENERATION_CONFIG in manifest.files else SamplingDefaults(),
        )

    @overload
    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[Mapping[str, Any]],
        *,
        images: list[Any] | None = None,
        audio: list[Any] | None = None,
        **options: Any,
    ) -> GenerationResult: ...
    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        *,
        images: list[list[Any] | None] | None = None,
        audio: list[list[Any] | None] | None = None,
        **options: Any,
    ) -> list[GenerationResult]: ...
    def generate(
        self, prompt: Any, *, images: list[Any] | None = None, audio: list[Any] | None = None, **options: Any
    ) -> GenerationResult | list[GenerationResult]:
        """Answers a prompt, or a batch of prompts of any lengths.

        Args:
            prompt: text, a list of messages `{"role", "content"}`, or token ids; or a list of these. Content is
                text, or parts of type text, image, audio and video, see `MessageReader`.
            images: the sources that the `<image_soft_token>`s of a text prompt stand for, in order; for a batch, a
                list of such lists, one for each prompt.
            audio: the same for `<audio_soft_token>`.
            options: the fields of `GenerationOptions`, `MediaOptions` and `ConstraintOptions`. Decoding is greedy;
                `sampling="default"` takes what is not given from the checkpoint's generation_config.json.

        Returns:
            A `GenerationResult`, or a list of them in the order of the prompts.

        Raises:
            PromptError: a prompt that cannot be encoded, or has other placeholders than media. MediaError: an image, a
            clip or a video that cannot be read. ContextLengthError: a prompt that is too long. OptionError: an option
            out of range. All are raised before any graph runs.
        """
        stream = self._begin(prompt, images, audio, options)
        for _ in stream:
            pass
        return stream.results() if _is_batch(prompt) else stream.result

    def stream(
        self, prompt: Prompt, *, images: list[Any] | None = None, audio: list[Any] | None = None, **options: Any
    ) -> GenerationStream:
        """Streams the answer to one prompt: iterate for pieces of text, each of whole characters.

        After the last piece, `result` holds the `GenerationResult`. Arguments and errors as for `generate`.
        """
        if _is_batch(prompt):
            raise PromptError("stream takes one prompt; use generate for a batch.")
        return self._begin(prompt, images, audio, options)

    async def agenerate(
        self, prompt: Any, *, images: list[Any] | None = None, audio: list[Any] | None = None, **options: Any
    ) -> Any:
        """`generate` for asyncio: the event loop stays free. A cancelled task ends generation at the next step."""
        stream = AsyncGenerationStream(partial(self._begin, prompt, images, audio, options))
        ended = await stream.finished()
        return ended.results() if _is_batch(prompt) else ended.result

    def astream(
        self, prompt: Prompt, *, images: list[Any] | None = None, audio: list[Any] | None = None, **options: Any
    ) -> AsyncGenerationStream:
        """`stream` for asyncio: `async for piece in model.astream(...)`. Errors are raised by the first step."""
        if _is_batch(prompt):
            raise PromptError("astream takes one prompt; use agenerate for a batch.")
        return AsyncGenerationStream(partial(self._begin, prompt, images, audio, options))

    def _begin(
        self, prompt: Any, images: list[Any] | None, audio: list[Any] | None, options: Mapping[str, Any]
    ) -> GenerationStream:
        """The stream of a prompt or of a batch, before its first step."""
        self.engine.require_open()
        chosen, media, check = self.options.read(options)
        if _is_batch(prompt):
            encoded = self.encode_batch(prompt, media, images=images, audio=audio)
        else:
            encoded = [self.encode(prompt, media, images=images, audio=audio)]
        longest = max(map(len, encoded))
        check_context(self.manifest.max_context, longest, chosen.max_new_tokens)
        with self.engine.turns:
            scheduler = Scheduler(
                self.engine,
                self.tokenizer,
                rows=len(encoded),
                capacity=longest + chosen.max_new_tokens,
                prefix_cache=self._prefix_cache,
            )
        return GenerationStream(
            scheduler, encoded, chosen, check=check, text_of=self.tokenizer.token_text, turns=self.engine.turns
        )

    @overload
    def log_likelihood(self, prompt: Prompt, continuation: str | Sequence[int], **options: Any) -> LogLikelihood: ...
    @overload
    def log_likelihood(
        self, prompt: Prompt, continuation: Sequence[str | Sequence[int]], **options: Any
    ) -> list[LogLikelihood]: ...
    def log_likelihood(
        self,
        prompt: Any,
        continuation: Any,
        *,
        images: list[Any] | None = None,
        audio: list[Any] | None = None,
        **media: Any,
    ) -> LogLikelihood | list[LogLikelihood]:
        """Natural-log probability of a continuation of a prompt, or of each of several continuations.

        Args:
            prompt: as for `generate`.
            continuation: text or token ids, or a list of these. After a text prompt, both texts are tokenized together,
                without the prompt's trailing whitespace as its end, as lm-evaluation-harness does.
            images, audio: as for `generate`.
            media: the fields of `MediaOptions`.

        Raises:
            ArtifactError: the artifact is of a version that has no scorer. PromptError: a continuation without a token
            of its own. Others as for `generate`.
        """
        options, several = read_media_options(media), _is_batch(continuation)
        wanted = continuation if several else [continuation]
        if isinstance(prompt, str):
            read = self.prompts.read_raw(prompt, images, audio, options)
            found = [self._score(*self._continue_text(prompt, each, read)) for each in wanted]
        else:
            begin = self.encode(prompt, options, images=images, audio=audio)
            found = [self._score(*self._continue(begin, each)) for each in wanted]
        return found if several else found[0]

    def _score(self, whole: PromptTokens, first: int) -> LogLikelihood:
        """Of the tokens from the position `first` on."""
        check_context(self.manifest.max_context, len(whole), 0)
        with self.engine.turns:
            scores = self.engine.score(whole, first)
        scored = token_logprobs(whole.ids[first:], scores, 1)
        return LogLikelihood(tuple(token.with_texts(self.tokenizer.token_text) for token in scored))

    def _continue(self, begin: PromptTokens, continuation: Any) -> tuple[PromptTokens, int]:
        """Prompt and continuation, and the position of the continuation's first token."""
        _require_continuation(continuation)
        if isinstance(continuation, str):
            ids = self.tokenizer.encode(continuation, add_bos=False)
        else:
            ids = encode_plain(continuation, self.tokenizer, self.manifest.vocab_size)
        return replace(begin, ids=[*begin.ids, *ids]), len(begin)

    def _continue_text(self, prompt: str, continuation: Any, media: RawMedia) -> tuple[PromptTokens, int]:
        """As `_continue`, but text and text are tokenized together."""
        encode = partial(self.prompts.encode_raw, media=media)
        if not isinstance(continuation, str):
            return self._continue(encode(prompt), continuation)
        _require_continuation(continuation)
        kept = prompt.rstrip()
        whole, first = encode(prompt + continuation), len(encode(kept)) if kept else 1
        if first >= len(whole):
            raise PromptError(
                f"{continuation!r} and the prompt's end are one token, so it has no probability of its own; end the "
                "prompt at a whole word, or give token ids."
            )
        return whole, first

    def chat(self, system: str | None = None) -> Chat:
        """A conversation whose KV cache is kept from turn to turn."""
        self.engine.require_open()
        return Chat(self.engine, self.prompts, self.options, system)

    def release(self, encoder: str | None = None) -> None:
        """Frees the "vision" or the "audio" encoder; without a name both, the prefill graph and the prefix cache.
        Graphs load again when needed."""
        with self.engine.turns:
            self.encoders.release(encoder)
            if encoder is None:
                self.engine.release()
                if self._prefix_cache:
                    self._prefix_cache.clear()

    def encode(
        self,
        prompt: Any,
        media: MediaOptions | None = None,
        template: TemplateOptions | None = None,
        *,
        images: list[Any] | None = None,
        audio: list[Any] | None = None,
    ) -> PromptTokens:
        """Token ids and soft-token spans of a prompt in any form, with its media as for `generate`; `template` says
        how messages are rendered."""
        return self.prompts.encode(prompt, media, template, images=images, audio=audio)

    def encode_batch(
        self,
        prompts: Sequence[Any],
        media: MediaOptions | None = None,
        *,
        images: list[Any] | None = None,
        audio: list[Any] | None = None,
    ) -> list[PromptTokens]:
        """Encodes each prompt; `images` and `audio` have one list, or None, for each."""
        sources = zip(_of_each("images", images, prompts), _of_each("audio", audio, prompts))
        return [
            self.encode(prompt, media, images=pictures, audio=clips)
            for prompt, (pictures, clips) in zip(prompts, sources)
        ]

    def read(self, messages: Sequence[Mapping[str, Any]], media: MediaOptions) -> list[dict[str, Any]]:
        """Validates messages, reads their media, and returns them in the chat template's form."""
        return self.prompts.read(messages, media)


def _require_continuation(continuation: Any) -> None:
    """Raises PromptError unless it is text or token ids, and not empty."""
    if not isinstance(continuation, str | list | tuple | np.ndarray):
        raise PromptError(f"A continuation must be text or token ids, not {type(continuation).__name__}.")
    if not len(continuation):
        raise PromptError("The continuation is empty; give the text to score.")


def _is_batch(prompt: Any) -> bool:
    """Whether this is a list of prompts rather than one prompt that is a list of messages or token ids."""
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], str | list | tuple)


def _of_each(name: str, given: Any, prompts: Sequence[Any]) -> list[Any]:
    """The media of each prompt of a batch."""
    if given is None:
        return [None] * len(prompts)
    lists = isinstance(given, list) and all(each is None or isinstance(each, list) for each in given)
    if not lists or len(given) != len(prompts):
        raise PromptError(f"In a batch, {name} must be a list of lists, one for each prompt ({len(prompts)} here).")
    return given
