"""Encoders of a checkpoint: their tensors and graphs, and the embedding rows of the hard tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from gemma3n_onnx.graphs import audio, names, vision
from gemma3n_onnx.graphs.config import SMALLEST, ConfigError, count, number
from gemma3n_onnx.graphs.embedder import MultimodalEmbedder
from gemma3n_onnx.graphs.embedding import HardRows

from . import trace
from .checkpoint.checkpoint import EMBEDDING, ENCODER_MODULES, Checkpoint
from .errors import CheckpointError, ExportOptionError
from .slicing import TensorCut
from .weights import as_torch, check_shape, cut_blocks

Shapes = Mapping[str, tuple[int, ...]]
# The encoder output, which is an input of the embedding graph, by modality.
FEATURES = {"vision": names.IMAGE_FEATURES, "audio": names.AUDIO_FEATURES}


@dataclass(frozen=True)
class CheckpointEncoder:
    """One encoder of a checkpoint. `shapes` has the shapes of its tensors in the file, including the embedder's."""

    modality: str
    shapes: Shapes
    trace: Callable[[], ir.Model]

    @property
    def file(self) -> str:
        return f"{self.modality}_encoder.onnx"

    @property
    def data_file(self) -> str:
        return f"{self.file}.data"


def choose_modalities(wanted: Iterable[str] | None, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The modalities to export, "text" first; all of the checkpoint's if `wanted` is None.

    Raises:
        ExportOptionError: the checkpoint lacks one.
    """
    if wanted is None:
        return checkpoint.modalities
    chosen = {"text", *wanted}
    if missing := sorted(chosen - set(checkpoint.modalities)):
        raise ExportOptionError(
            f"{checkpoint.name} has no {missing[0]}: it holds {', '.join(checkpoint.modalities)}; give others with "
            "--modalities, or a full checkpoint."
        )
    return tuple(modality for modality in checkpoint.modalities if modality in chosen)


def find_encoders(checkpoint: Checkpoint, modalities: Iterable[str]) -> dict[str, CheckpointEncoder]:
    """The encoders of the given modalities, by modality, with their tensors checked.

    Raises:
        CheckpointError: config.json does not match the tensors, or describes an encoder that is not implemented.
    """
    try:
        found = {m: _MAKERS[m](checkpoint) for m in modalities if m in _MAKERS}
    except ConfigError as error:
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: {str(error).rstrip('.')}; give an unchanged checkpoint of Gemma 3n."
        ) from error
    for encoder in found.values():
        _check_tensors(checkpoint, encoder)
    return found


def _vision(checkpoint: Checkpoint) -> CheckpointEncoder:
    config = vision.VisionConfig.from_hf(checkpoint.config)
    return CheckpointEncoder("vision", vision.checkpoint_shapes(config), lambda: trace.trace_vision(config))


def _audio(checkpoint: Checkpoint) -> CheckpointEncoder:
    config = audio.AudioConfig.from_hf(checkpoint.config)
    return CheckpointEncoder("audio", audio.checkpoint_shapes(config), lambda: trace.trace_audio(config))


_MAKERS: Mapping[str, Callable[[Checkpoint], CheckpointEncoder]] = {"vision": _vision, "audio": _audio}


def _check_tensors(checkpoint: Checkpoint, encoder: CheckpointEncoder) -> None:
    found = set(checkpoint.encoder_names(encoder.modality))
    if unused := found - encoder.shapes.keys():
        raise CheckpointError(
            f"The checkpoint has {min(unused)} and {len(unused) - 1} more tensors that the {encoder.modality} "
            "encoder of its config.json does not have; give an unchanged checkpoint of Gemma 3n."
        )
    for name, wanted in encoder.shapes.items():
        _check_shape(checkpoint, name, wanted)


def _check_shape(checkpoint: Checkpoint, name: str, wanted: tuple[int, ...]) -> None:
    check_shape(name, checkpoint.raw_spec(checkpoint.encoder_raw_name(name)).shape, wanted)


@dataclass(frozen=True)
class HardTokens:
    """The token ids whose embeddings are in the embedders, in the embedders' order, and ids added after them."""

    rows: HardRows
    embedders: Mapping[str, MultimodalEmbedder]
    """By module name, on the meta device."""


def find_hard_tokens(checkpoint: Checkpoint) -> HardTokens | None:
    """The hard tokens of a checkpoint; None without both embedders, or if the vocabulary ends before their ids.

    Raises:
        CheckpointError: config.json or the tensors are not a Gemma 3n's.
    """
    if len(checkpoint.modalities) <= len(ENCODER_MODULES):
        return None
    config, embedders = checkpoint.text_config, {}
    first: int | None = None
    for modality, (_, module) in reversed(ENCODER_MODULES.items()):
        section = checkpoint.config.get(f"{modality}_config")
        section = section if isinstance(section, dict) else {}
        try:
            vocab, offset, hidden = (count(section, key) for key in ("vocab_size", "vocab_offset", "hidden_size"))
            eps = number(section, "rms_norm_eps", SMALLEST, 1)
        except KeyError as error:
            raise CheckpointError(f"{modality}_config has no {error.args[0]}; download config.json again.") from error
        except ConfigError as error:
            reason = str(error).rstrip(".")
            raise CheckpointError(f"{modality}_config: {reason}; download config.json again.") from error
        if first is not None and offset != first - vocab:
            raise CheckpointError(
                f"{modality}_config has vocab_offset {offset} instead of {first - vocab}; download config.json again."
            )
        first = offset
        with torch.device("meta"):
            embedders[module] = MultimodalEmbedder(vocab, hidden, config.hidden_size, eps)
        for name, parameter in embedders[module].named_parameters():
            _check_shape(checkpoint, f"{module}.{name}", tuple(parameter.shape))
    assert first is not None
    if first >= config.vocab_size:
        return None
    return HardTokens(HardRows(first, config.vocab_size - first), dict(reversed(embedders.items())))


def hard_row_values(checkpoint: Checkpoint, tokens: HardTokens) -> Iterator[np.ndarray]:
    """Rows [n, text hidden] of each embedder, fp32 and unscaled like `embed_tokens`, and of the ids added after theirs,
    in the order of the ids.

    An added id has its row of `embed_tokens`, as in transformers' text model; its multimodal model fails on such ids.
    """
    scale = checkpoint.text_config.hidden_size**0.5
    vocab, left = checkpoint.text_config.vocab_size, tokens.rows.count
    for module, outline in tokens.embedders.items():
        if not left:
            break
        weights = {
            name: as_torch(checkpoint.raw_read(checkpoint.encoder_raw_name(f"{module}.{name}"))).float()
            for name, _ in outline.named_parameters()
        }
        embedder = copy.deepcopy(outline)
        embedder.load_state_dict(weights, strict=True, assign=True)
        with torch.no_grad():
            rows = (embedder.hard(embedder.embedding.weight[:left]) / scale).numpy()
        left -= len(rows)
        yield rows
    yield from cut_blocks(checkpoint, TensorCut(EMBEDDING, rows=((vocab - left, vocab),)))
