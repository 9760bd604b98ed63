"""A Gemma 3n checkpoint in Hugging Face format, read lazily."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from gemma3n_onnx.export.errors import CheckpointError, CheckpointNotFoundError
from gemma3n_onnx.graphs.config import ConfigError, TextConfig
from gemma3n_onnx.runtime.artifact import is_own_file

from .hub import SLICE_TABLE, find_folder
from .peft_names import ADAPTER_CONFIG, MERGE, plain_names
from .safetensors_file import NUMPY_DTYPES, SafetensorsFile, TensorSpec

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
EMBEDDING, PER_LAYER, HEAD = "embed_tokens.weight", "embed_tokens_per_layer.weight", "lm_head.weight"


@dataclass(frozen=True)
class TensorNaming:
    """How a checkpoint names its tensors: prefixes of the raw names, and the raw name of a separate output head."""

    text: str
    """Prefix of the text decoder."""
    encoders: str | None
    """Prefix of encoders and embedders; None in a text-only checkpoint."""
    head: str


FULL_NAMING = TensorNaming("model.language_model.", "model.", "lm_head.weight")
TEXT_ONLY_NAMING = TensorNaming("model.", None, "lm_head.weight")
TRANSFORMERS_4_NAMING = TensorNaming("language_model.model.", "", "language_model.lm_head.weight")
# Of models saved without their head: Gemma3nModel and Gemma3nTextModel.
HEADLESS_NAMING = TensorNaming("language_model.", "", "lm_head.weight")
HEADLESS_TEXT_NAMING = TensorNaming("", None, "lm_head.weight")
NAMINGS = (FULL_NAMING, TRANSFORMERS_4_NAMING, TEXT_ONLY_NAMING, HEADLESS_NAMING, HEADLESS_TEXT_NAMING)
# The modules of each modality besides text.
ENCODER_MODULES = {"vision": ("vision_tower", "embed_vision"), "audio": ("audio_tower", "embed_audio")}
TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
COMPARE_BYTES = 32 * 2**20


class Checkpoint:
    """The config and the tensors of one checkpoint folder.

    Methods take names relative to the text decoder (`layers.0.mlp.gate_proj.weight`), whatever the file's prefix; the
    `raw_` methods take the names in the file, without PEFT's additions, and reach every tensor. Arrays are read-only
    views of the file.

    Attributes:
        folder: where the files are.
        name: the folder's name, or the Hub id without its owner.
        config: the content of config.json.
        text_config: the architecture of the text decoder. The vocabulary is that of the tables if they have more rows
            than config.json says: a table may have been resized without it.
        naming: how raw names are formed.
        modalities: the checkpoint's modalities, "text" first.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        """Opens a local folder; see `open` for the errors."""
        self.folder = folder
        self.name = name or folder.resolve().name
        config = _companion(folder, "config.json")
        if config is None:
            raise _not_found(folder, "config.json; give the folder of a Hugging Face checkpoint")
        self.config = _read_json(config)
        try:
            self.text_config = TextConfig.from_hf(self.config)
        except ConfigError as error:
            raise CheckpointError(
                f"{folder / 'config.json'}: {str(error).rstrip('.')}; give an unchanged checkpoint of Gemma 3n."
            ) from error
        self._tensors = _open_tensors(folder)
        self.naming = self._find_naming()
        self.modalities = ("text", *(m for m in ENCODER_MODULES if self.encoder_names(m)))
        self._check_dtypes()
        self.text_config = replace(
            self.text_config,
            vocab_size=max(self.text_config.vocab_size, self._rows(EMBEDDING)),
            vocab_size_per_layer_input=max(self.text_config.vocab_size_per_layer_input, self._rows(PER_LAYER)),
            tied_head=self._ties_head(),
        )

    @classmethod
    def open(cls, model: str | Path, revision: str | None = None, token: str | None = None) -> Checkpoint:
        """Opens a local folder, else the packaged checkpoint "demo", else the Hub id `model` ("org/name"), which is
        downloaded unless cached.

        Args:
            model: a folder, "demo" or a Hub id.
            revision: branch, tag or commit; for a Hub id only.
            token: a Hub token; None for HF_TOKEN or the stored login.

        Raises:
            CheckpointNotFoundError: no such folder or repository, no access to it, or no checkpoint in it.
            CheckpointError: not a Gemma 3n, a damaged or missing file, an unsupported dtype.
        """
        return cls(find_folder(model, revision, token), Path(model).resolve().name)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The raw names of all tensors, sorted."""
        return tuple(sorted(self._tensors))

    def text_names(self) -> tuple[str, ...]:
        """Names of the text decoder's tensors, sorted; without a tied head."""
        prefix = self.naming.text
        inner = (name for name in self.names if name.startswith(prefix) and name != self.naming.head)
        head = () if self.text_config.tied_head else (HEAD,)
        return tuple(sorted((*(name.removeprefix(prefix) for name in inner), *head)))

    def encoder_names(self, modality: str) -> tuple[str, ...]:
        """Names of a modality's encoder and embedder tensors, starting with the module (`audio_tower.…`), sorted."""
        prefix = self.naming.encoders
        if prefix is None:
            return ()
        wanted = tuple(f"{prefix}{module}." for module in ENCODER_MODULES[modality])
        return tuple(name.removeprefix(prefix) for name in self.names if name.startswith(wanted))

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a text tensor.

        Raises:
            CheckpointError: no such tensor; the other readers raise it too.
        """
        return self.raw_spec(self._raw_name(name))

    def read(self, name: str) -> np.ndarray:
        """A text tensor in the dtype of the file (bf16 as `ml_dtypes.bfloat16`)."""
        return self.raw_read(self._raw_name(name))

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a text tensor; no other row is read."""
        return self.raw_read_rows(self._raw_name(name), start, stop)

    def _raw_name(self, name: str) -> str:
        return self.naming.head if name == HEAD else self.naming.text + name

    def raw_spec(self, name: str) -> TensorSpec:
        tensor = self._tensor(name)
        return tensor.file.spec(tensor.name)

    def raw_read(self, name: str) -> np.ndarray:
        tensor = self._tensor(name)
        return tensor.file.read(tensor.name)

    def raw_read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        tensor = self._tensor(name)
        return tensor.file.read_rows(tensor.name, start, stop)

    def encoder_raw_name(self, name: str) -> str:
        """The raw name of a tensor that `encoder_names` lists."""
        return f"{self.naming.encoders}{name}"

    def tokenizer_files(self) -> list[Path]:
        """The existing tokenizer and processor files, which an export copies. CheckpointError: one is a link to a file
        elsewhere."""
        return [path for name in TOKENIZER_FILES if (path := _companion(self.folder, name)) is not None]

    @property
    def slice_table(self) -> Path | None:
        """The checkpoint's own slice table, if it has one."""
        path = self.folder / SLICE_TABLE
        return path if path.exists() else None

    def chat_template(self) -> str | None:
        """The Jinja source of the (default) chat template, from whichever file has it."""
        if (jinja := _companion(self.folder, "chat_template.jinja")) is not None:
            try:
                return jinja.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{jinja} is not UTF-8 text; download it again.") from error
        for name in ("tokenizer_config.json", "chat_template.json"):
            path = _companion(self.folder, name)
            if path is None:
                continue
            template = _read_json(path).get("chat_template")
            if isinstance(template, list):
                named = [entry for entry in template if isinstance(entry, dict)]
                template = {entry.get("name"): entry.get("template") for entry in named}.get("default")
            if template is None:
                continue
            if not isinstance(template, str):
                raise CheckpointError(f"The chat_template of {path} is not text; download it again.")
            return template
        return None

    def generation_config(self) -> dict[str, Any]:
        """The content of generation_config.json; empty if there is none."""
        path = _companion(self.folder, "generation_config.json")
        return {} if path is None else _read_json(path)

    def processor_config(self, part: str) -> dict[str, Any]:
        """Settings of `image_processor` or `feature_extractor`; empty if no file has them.

        transformers 5 nests them in processor_config.json; earlier releases mix both in preprocessor_config.json.
        """
        for name in ("processor_config.json", "preprocessor_config.json"):
            path = _companion(self.folder, name)
            settings = {} if path is None else _read_json(path)
            settings = settings.get(part, settings)
            if not isinstance(settings, dict):
                raise CheckpointError(f"The {part} of {path} is not an object; download it again.")
            if "rescale_factor" in settings or "sampling_rate" in settings:
                return settings
        return {}

    def check_tokenizer(self) -> None:
        """Raises CheckpointError if the runtime could not read the tokenizer or the chat template, or if a file to copy
        is a link to one elsewhere."""
        path = _companion(self.folder, TOKENIZER)
        if path is None:
            raise CheckpointNotFoundError(f"{self.folder} has no {TOKENIZER}, which the artifact needs; download it.")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises a bare Exception
            raise CheckpointError(f"{path} is not a tokenizer ({error}); download it again.") from error
        last = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        if last >= self.text_config.vocab_size:
            raise CheckpointError(
                f"{path} has token ids up to {last:,}, but {EMBEDDING} has {self.text_config.vocab_size:,} rows; give "
                "the tokenizer of this checkpoint, or save the model after model.resize_token_embeddings."
            )
        self.chat_template()
        self.tokenizer_files()

    def _tensor(self, name: str) -> _Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} has no tensor {name}; download the checkpoint again.") from None

    def check_all_known(self) -> None:
        """Raises CheckpointError if a tensor is not part of a Gemma 3n."""
        if unknown := set(self.names) - {self.naming.head, *self._known_names()}:
            raise CheckpointError(
                f"The checkpoint has {min(unknown)} and {len(unknown) - 1} more tensors that no Gemma 3n has; "
                "give an unchanged checkpoint of Gemma 3n."
            )

    def _find_naming(self) -> TensorNaming:
        for naming in NAMINGS:
            if naming.text + EMBEDDING in self._tensors:
                return naming
        raise CheckpointError(
            f"{self.folder} has no Gemma 3n text decoder: there is no "
            f"{' or '.join(naming.text + EMBEDDING for naming in NAMINGS)}."
        )

    def _known_names(self) -> list[str]:
        """Raw names of all tensors of a Gemma 3n, without a tied head."""
        encoders = (self.encoder_raw_name(name) for m in ENCODER_MODULES for name in self.encoder_names(m))
        return [*map(self._raw_name, self.text_names()), *encoders]

    def _check_dtypes(self) -> None:
        for name in sorted(self._tensors.keys() & {*self._known_names(), self.naming.head}):
            if (dtype := self.raw_spec(name).dtype) not in NUMPY_DTYPES:
                raise CheckpointError(
                    f"{name} in {self.folder} is of dtype {dtype}; "
                    f"use a checkpoint in {', '.join(NUMPY_DTYPES)} (quantized ones are not read)."
                )

    def _rows(self, name: str) -> int:
        shape = self.spec(name).shape
        return shape[0] if shape else 0

    def _ties_head(self) -> bool:
        """Whether the head is the token embedding, because it equals it or is not there.

        Two different tensors are read as they are, whatever tie_word_embeddings says, as transformers does.

        Raises:
            CheckpointError: config.json says that the head is not tied, and there is none.
        """
        if self.naming.head not in self._tensors:
            if tied := self.config.get("tie_word_embeddings", True):
                return True
            raise CheckpointError(
                f"{self.folder} has no {self.naming.head}, but its config.json sets tie_word_embeddings to "
                f"{json.dumps(tied)}; save "
                "the whole model with its head, or set it to true if the head is the token embedding."
            )
        spec = self.spec(EMBEDDING)
        if self.spec(HEAD) != spec or len(spec.shape) != 2:
            return False
        rows, columns = spec.shape
        step = max(1, COMPARE_BYTES // max(1, columns * NUMPY_DTYPES[spec.dtype].itemsize))
        return all(
            np.array_equal(
                self.read_rows(HEAD, start, min(start + step, rows)).view(np.uint8),
                self.read_rows(EMBEDDING, start, min(start + step, rows)).view(np.uint8),
            )
            for start in range(0, rows, step)
        )


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the checkpoint: the file that holds it, and its name there."""

    file: SafetensorsFile
    name: str


def _open_tensors(folder: Path) -> dict[str, _Tensor]:
    """The tensors of all weight files, by their names without PEFT's additions."""
    files = _open_files(folder)
    return {plain: _Tensor(files[stored], stored) for plain, stored in plain_names(files).items()}


def _open_files(folder: Path) -> dict[str, SafetensorsFile]:
    """`{raw name: the file that holds it}`."""
    if (folder / WEIGHTS).is_file():
        file = SafetensorsFile(folder / WEIGHTS)
        return dict.fromkeys(file.names, file)
    if not (folder / INDEX).is_file():
        raise _not_found(folder, f"{WEIGHTS} and no {INDEX}; only safetensors weights are read")
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{folder / INDEX} has no weight_map; download it again.")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{folder / INDEX} names {shard!r}, which is not in its folder; download it again.")
    shards = {}
    for shard in sorted(set(weight_map.values())):
        if not os.path.isfile(folder / shard):  # unlike `Path.is_file`, False for a name that is too long
            raise CheckpointNotFoundError(f"{folder} lacks {shard}, which {INDEX} lists; download it again.")
        shards[shard] = SafetensorsFile(folder / shard)
    held = {shard: set(file.names) for shard, file in shards.items()}
    for name, shard in weight_map.items():
        if name not in held[shard]:
            raise CheckpointError(f"{folder / shard} lacks {name}, which {INDEX} lists; download it again.")
    return {name: shards[shard] for name, shard in weight_map.items()}


def _companion(folder: Path, name: str) -> Path | None:
    """A file whose content an artifact repeats, if the checkpoint has it.

    Raises:
        CheckpointError: it is a link to a file elsewhere, which an artifact would publish.
    """
    path = folder / name
    if not path.is_file():
        return None
    if not is_own_file(path):
        raise CheckpointError(f"{path} is a link to a file elsewhere; copy that file into the folder.")
    return path


def _not_found(folder: Path, lacking: str) -> CheckpointNotFoundError:
    """For a folder without what `lacking` says, which may be a PEFT adapter."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return CheckpointNotFoundError(f"{folder} has no {lacking}.")
    base = _read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    return CheckpointNotFoundError(f"{folder} is a PEFT adapter for {base}, not a whole checkpoint; {MERGE}.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; download it again.")
    return content
