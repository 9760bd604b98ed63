"""A consumer's layout: which graphs it has, how they are adapted, and which files go with them.

To add a layout, write a module with a subclass of `Layout` and add an instance to `select.BUILT_IN`. Modules of layouts
import passes in `adapt`, because the command line reads their names and must start fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from gemma3n_onnx.export.quantization.precision import Precision
from gemma3n_onnx.graphs.config import TextConfig
from gemma3n_onnx.runtime.artifact import Manifest

if TYPE_CHECKING:
    import onnx_ir as ir

ConfigFiles = dict[str, Mapping[str, Any]]
"""Contents of JSON files, by file name."""


@dataclass(frozen=True)
class Requested:
    """The options that a layout may refuse, as the user gave them."""

    precision: str
    target: str
    logits: str
    modalities: tuple[str, ...] | None


GRAPHS = ("decoder", "embedding", "prefill", "scorer", "candidates", "vision", "audio")
"""Keys of `Layout.graph_files`."""


class Layout(ABC):
    name: ClassVar[str]
    marker: ClassVar[str]
    """A glob that matches a file in every output of this layout: `--force` replaces only folders with a match."""
    folder: ClassVar[str] = ""
    """The subfolder of the output that holds graphs and weights."""
    modalities: ClassVar[tuple[str, ...] | None] = None
    """The modalities exported by default; None for all of the checkpoint's."""
    windowed_caches: ClassVar[bool] = False
    """Whether KV caches of sliding-window layers keep only the window; otherwise all caches keep all positions."""
    merges_soft_tokens: ClassVar[bool] = False
    """The embedding graph takes encoder features and replaces the soft tokens by them."""
    writes_manifest: ClassVar[bool] = False

    def check(self, requested: Requested) -> None:  # noqa: B027
        """Raises ExportOptionError for an option that the consumer does not support."""

    def precision(self, precision: Precision) -> Precision:
        """The precision without the parts that the consumer cannot use, such as a separate prefill graph."""
        return precision

    @abstractmethod
    def graph_files(self, precision: str) -> Mapping[str, str]:
        """File names in `folder`, by graph, a key of `GRAPHS`. A graph without an entry is not written."""

    def adapt(self, decoder: ir.Model, embedding: ir.Model, config: TextConfig) -> None:  # noqa: B027
        """Rewrites both graphs in place for the consumer; they have no weights yet."""

    def config_files(self, model_config: Mapping[str, Any], manifest: Manifest, config: TextConfig) -> ConfigFiles:
        """The consumer's config files. `model_config` is transformers' `config.json` of the slice."""
        return {"config.json": model_config}
