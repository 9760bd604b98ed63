"""The sampling values of a checkpoint, from its generation_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from gemma3n_onnx.runtime.errors import ArtifactError, OptionError

from .options import GenerationOptions

GENERATION_CONFIG = "generation_config.json"
TOP_K = 50
"""Of transformers, for a config that samples and gives no top_k."""


@dataclass(frozen=True)
class SamplingDefaults:
    """Fields as of `GenerationOptions`, as transformers reads them: greedy unless the config has `do_sample`.

    The other fields of a generation_config.json are ignored, except for token ids, which are in the manifest.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Raises OptionError for a value that is out of range."""
        GenerationOptions(**asdict(self))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Raises OptionError for a value that is out of range."""
        samples = config.get("do_sample")
        if samples not in (None, False, True):
            raise OptionError(f"do_sample must be true or false, not {samples!r}.")
        values = {name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None}
        values = {"temperature": 1.0, "top_k": TOP_K} | values if samples else values | {"temperature": 0.0}
        if values.get("top_k") == 0:
            values["top_k"] = None
        return cls(**values)

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Of an artifact; without the file, greedy.

        Raises:
            ArtifactError: the file cannot be read, or has a value that is out of range.
        """
        path = folder / GENERATION_CONFIG
        try:
            config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (OSError, ValueError, RecursionError) as error:
            raise ArtifactError(f"{path} is not valid JSON ({error}); export the artifact again.") from error
        if not isinstance(config, dict):
            raise ArtifactError(f"{path} is not a JSON object; export the artifact again.")
        try:
            return cls.from_config(config)
        except OptionError as error:
            raise ArtifactError(f"{path}: {error}") from error

    def under(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options `given`, and these values where it has none."""
        return asdict(self) | dict(given)
