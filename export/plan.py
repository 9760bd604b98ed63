"""All decisions of an export, checked against the checkpoint before anything is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

from gemma3n_onnx.graphs.config import Logits
from gemma3n_onnx.graphs.embedding import HardRows
from gemma3n_onnx.runtime.artifact import BYTES_PER_VALUE

from .chat_template import choose_chat_template
from .checkpoint.checkpoint import Checkpoint
from .checkpoint.processor import FrontEnds, read_front_ends
from .checkpoint.sampling import check_sampling
from .checkpoint.token_ids import TokenIds, token_ids
from .encoders import CheckpointEncoder, HardTokens, choose_modalities, find_encoders, find_hard_tokens
from .layouts.base import Layout
from .layouts.select import layout_named
from .options import ExportOptions, check_options
from .quantization.precision import Precision
from .quantization.recipes import precision_for
from .slicing import Slice, choose_slice
from .text_weights import StoredWeights, lay_out_prefill, lay_out_text, tensor_shapes
from .weights import check_tensors

_SMALL_FILES_BYTES = 64 << 20  # graphs, tokenizer, configs: an upper bound for the disk-space check


@dataclass(frozen=True)
class ExportPlan:
    source: str
    """The name of the checkpoint."""
    slice: Slice
    precision_name: str
    precision: Precision
    target: str
    logits: Logits
    layout: Layout
    tokens: TokenIds
    hard_tokens: HardTokens | None
    front_ends: FrontEnds
    chat_template: str | None
    """Jinja source; None if neither the checkpoint nor the options have one."""
    encoders: Mapping[str, CheckpointEncoder]
    """By modality."""
    text_weights: StoredWeights
    """The weights of the decoder and both tables."""
    prefill_weights: StoredWeights
    """The weights that the prefill graph does not share with the decoder; empty without a prefill graph."""

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("text", *self.encoders)

    @property
    def hard_rows(self) -> HardRows | None:
        return self.hard_tokens.rows if self.hard_tokens else None

    @property
    def windowed_caches(self) -> bool:
        """Whether KV caches of sliding-window layers keep only the window."""
        return self.layout.windowed_caches and not self.precision.device

    @property
    def argmax_in_decoder(self) -> bool:
        """Whether the decoder graph returns the argmax, so that a greedy step copies no logits to the host."""
        return self.precision.device and self.logits == "last"

    @property
    def scores(self) -> bool:
        """Whether a second graph over the decoder's weights gives log-probabilities of given tokens."""
        return "scorer" in self.layout.graph_files(self.precision_name)

    @property
    def needed_bytes(self) -> int:
        """An upper bound of the artifact's size."""
        text = sum(stored.nbytes for stored in chain(self.text_weights.values(), self.prefill_weights.values()))
        encoders = sum(math.prod(shape) for encoder in self.encoders.values() for shape in encoder.shapes.values())
        return text + encoders * BYTES_PER_VALUE[self.precision.storage] + _SMALL_FILES_BYTES


def plan_export(checkpoint: Checkpoint, options: ExportOptions) -> ExportPlan:
    """Reads only the checkpoint's metadata, no weights.

    Raises:
        SliceError, CheckpointError, ChatTemplateError, ExportOptionError: each says what to change.
    """
    check_options(options)
    layout = layout_named(options.layout)
    precision = layout.precision(precision_for(options.precision_name, options.target, options.quantization))
    chosen = choose_slice(checkpoint, options.slice, options.matformer_config)
    modalities = choose_modalities(options.modalities or layout.modalities, checkpoint)
    tokens = token_ids(checkpoint)
    check_sampling(checkpoint)
    checkpoint.check_tokenizer()
    check_tensors(checkpoint, chosen, tensor_shapes(chosen.source))
    checkpoint.check_all_known()
    front_ends = read_front_ends(checkpoint, modalities)
    encoders = find_encoders(checkpoint, modalities)
    hard_tokens = find_hard_tokens(checkpoint)
    chat_template = choose_chat_template(checkpoint, options.chat_template)
    text_weights = lay_out_text(chosen.config, precision, hard_tokens.rows if hard_tokens else None)
    prefills = options.logits == "last" and "prefill" in layout.graph_files(options.precision_name)
    return ExportPlan(
        source=checkpoint.name,
        slice=chosen,
        precision_name=options.precision_name,
        precision=precision,
        target=options.target,
        logits=options.logits,
        layout=layout,
        tokens=tokens,
        hard_tokens=hard_tokens,
        front_ends=front_ends,
        chat_template=chat_template,
        encoders=encoders,
        text_weights=text_weights,
        prefill_weights=lay_out_prefill(chosen.config, precision, text_weights) if prefills else {},
    )
