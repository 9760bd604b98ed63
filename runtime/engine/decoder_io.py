"""Checks a graph's inputs and outputs at load."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from types import MappingProxyType

from gemma3n_onnx.runtime.artifact import (
    ATTENTION_MASK,
    INPUTS_EMBEDS,
    LOGITS,
    PER_LAYER_INPUTS,
    POSITION_IDS,
    GraphInfo,
    Manifest,
    TensorInfo,
)
from gemma3n_onnx.runtime.errors import ArtifactError, shown

from .ort import Session

Widths = Mapping[str, tuple[str, int | None]]
"""Dtype and width, None for any, by name."""


def logits_of(manifest: Manifest) -> Widths:
    """The outputs of a decoder, without its KV caches."""
    return {LOGITS: ("fp32", manifest.vocab_size)}


def check_decoder(
    session: Session, manifest: Manifest, info: GraphInfo, outputs: Widths, more_inputs: Widths = MappingProxyType({})
) -> None:
    """Raises ArtifactError if the inputs and outputs of a decoder do not match the manifest. `outputs` are those
    beside the KV caches, `more_inputs` those beside the ones that every decoder has."""
    compute = manifest.compute_dtype
    inputs = {
        INPUTS_EMBEDS: (compute, manifest.token_embeddings.width),
        PER_LAYER_INPUTS: (compute, manifest.per_layer_embeddings.width),
        POSITION_IDS: ("int64", None),
        ATTENTION_MASK: ("int64", None),
        **more_inputs,
    }
    outputs = dict(outputs)
    for cache in manifest.caches:
        inputs |= dict.fromkeys((cache.past_key, cache.past_value), (cache.dtype, cache.head_dim))
        outputs |= dict.fromkeys((cache.present_key, cache.present_value), (cache.dtype, cache.head_dim))
    for kind, wanted, found in (("input", inputs, session.inputs), ("output", outputs, session.outputs)):
        tensors = {tensor.name: tensor for tensor in found}
        for name, (dtype, width) in wanted.items():
            tensor = tensors.pop(name, None)
            if tensor is None:
                complaint = f"has no {kind} {name!r}"
            elif tensor.dtype != dtype:
                complaint = f"has the {kind} {name!r} in {tensor.dtype} instead of {dtype}"
            elif width is not None and tensor.shape and isinstance(tensor.shape[-1], int) and tensor.shape[-1] != width:
                complaint = f"has the {kind} {name!r} of width {tensor.shape[-1]} instead of {width}"
            else:
                continue
            raise ArtifactError(f"{info.file} {complaint}; export the artifact again.")
        if kind == "input" and tensors:
            raise ArtifactError(
                f"{info.file} has the input {min(tensors)!r}, which the manifest does not describe; "
                "export the artifact again."
            )
    check_signature(session, info)


def check_signature(session: Session, info: GraphInfo) -> None:
    """Raises ArtifactError if a graph's inputs and outputs are not those that the manifest lists for it."""
    for kind, wanted, found in (("input", info.inputs, session.inputs), ("output", info.outputs, session.outputs)):
        for listed, own in itertools.zip_longest(wanted, found):
            if listed is None or own is None or (listed.name, listed.dtype) != (own.name, own.dtype):
                raise ArtifactError(
                    f"{info.file} has the {kind} {_described(own)} where the manifest has {_described(listed)}; "
                    "export the artifact again."
                )


def _described(tensor: TensorInfo | None) -> str:
    return "none" if tensor is None else f"{shown(tensor.name)} in {tensor.dtype[:40]}"
