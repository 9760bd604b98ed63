"""The reference: transformers' Gemma 3n on the weights of a checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gemma3n_onnx.export.checkpoint.checkpoint import ENCODER_MODULES, Checkpoint
from gemma3n_onnx.export.encoders import find_hard_tokens
from gemma3n_onnx.export.errors import ExportError
from gemma3n_onnx.export.quantization.config import PerRow, QuantizationConfig, Storage
from gemma3n_onnx.export.quantization.rounding import IN_BF16, of_storage, rounded
from gemma3n_onnx.export.slicing import Slice, TensorCut
from gemma3n_onnx.export.text_weights import HEAD, PER_LAYER, TOKENS
from gemma3n_onnx.export.weights import as_stored, as_torch, read_cut
from gemma3n_onnx.runtime.artifact import Manifest

from .torchvision_shim import complete_torchvision

Encode = Callable[..., np.ndarray]
StorageOf = Callable[[str], Storage]
"""How a tensor is stored, by its name: relative to the text decoder, or to `model.` for encoders."""


def unchanged(name: str) -> Storage:
    return "fp32"


def stored_in(manifest: Manifest) -> StorageOf:
    storages = {
        name: PerRow() if info.block is None else QuantizationConfig(info.bits, info.block, info.method)
        for name, info in manifest.quantization.items()
    }
    return lambda name: storages.get(name, manifest.storage)


def stored_in_encoder(manifest: Manifest, modality: str) -> StorageOf:
    dtype = manifest.encoders[modality].compute_dtype
    return stored_in(manifest) if dtype == "fp32" else lambda name: dtype


def stored_for_prefill(manifest: Manifest) -> StorageOf:
    """The prefill graph quantizes by rows the matrices that the decoder quantizes in blocks."""
    blocks = {name for name, info in manifest.quantization.items() if info.block is not None}
    blocks -= {TOKENS, PER_LAYER, HEAD}
    decoder = stored_in(manifest)
    return lambda name: PerRow() if name in blocks else decoder(name)


def _from_transformers(*names: str) -> list[Any]:
    """Classes of transformers' Gemma 3n, by name.

    Raises:
        ExportError: transformers cannot be imported.
    """
    complete_torchvision()
    try:
        import transformers
        from transformers.models.gemma3n import modeling_gemma3n

        return [getattr(transformers, name, None) or getattr(modeling_gemma3n, name) for name in names]
    except (ImportError, RuntimeError) as error:
        raise ExportError(
            f"transformers cannot be imported ({_first_line(error)}); install releases of it, and of the package that "
            "it names, that match this torch."
        ) from error


def check_transformers() -> None:
    """Raises ExportError if transformers' Gemma 3n cannot be imported."""
    _from_transformers("Gemma3nForCausalLM")


def _first_line(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    return str(cause).strip().splitlines()[0].rstrip(".")


def load_decoder(checkpoint: Checkpoint, chosen: Slice, storage_of: StorageOf = unchanged) -> nn.Module:
    """transformers' Gemma 3n text model in fp32 with the slice's weights, rounded or quantized as `storage_of` says.

    The PLE table stays in the checkpoint's file and is read row by row, so that a full-size model fits into memory.
    """
    causal_lm, text_config = _from_transformers("Gemma3nForCausalLM", "Gemma3nTextConfig")
    raw = chosen.hf_config(checkpoint.config)
    config = text_config(**raw.get("text_config", raw))
    with torch.device("meta"):
        reference = causal_lm._from_config(config, attn_implementation="eager").eval()
    reference.model.embed_tokens_per_layer = _RowsFromCheckpoint(checkpoint, chosen, storage_of(PER_LAYER))

    def stored(name: str, parameter: nn.Parameter) -> Tensor:
        values = read_cut(checkpoint, chosen.source_of(name))
        if values.shape != parameter.shape:
            raise ExportError(f"Tensor {name} has shape {list(values.shape)}, not {list(parameter.shape)}.")
        return as_stored(values.float(), storage_of(name))

    state = {name: stored(name, parameter) for name, parameter in reference.model.named_parameters()}
    reference.model.load_state_dict(state, strict=True, assign=True)
    if chosen.config.tied_head:
        reference.lm_head.weight = reference.model.embed_tokens.weight
    else:
        reference.lm_head.weight = nn.Parameter(stored(HEAD, reference.lm_head.weight), requires_grad=False)
    _materialize_buffers(reference, config)
    if (hard_tokens := find_hard_tokens(checkpoint)) is not None:
        rows = load_hard_rows(checkpoint, storage_of(TOKENS))
        reference.model.embed_tokens = _WithHardRows(reference.model.embed_tokens, hard_tokens.rows.first_id, rows)
    return reference


class _WithHardRows(nn.Module):
    """Replaces `embed_tokens`: ids from `first_id` on read the hard rows, as in `Gemma3nModel.forward`.

    Ids above the hard rows, on which that fails, read their own embedding.
    """

    def __init__(self, embed_tokens: nn.Embedding, first_id: int, rows: Tensor) -> None:
        super().__init__()
        self._embed_tokens, self._first_id, self.rows = embed_tokens, first_id, rows

    @property
    def weight(self) -> Tensor:
        return self._embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        rows = ids - self._first_id
        is_hard = (rows >= 0) & (rows < len(self.rows))
        return torch.where(is_hard[..., None], self.rows[rows * is_hard], self._embed_tokens(ids))


class _RowsFromCheckpoint(nn.Module):
    """Replaces `embed_tokens_per_layer`: reads scaled rows from the file.

    Ids beyond the table read row 0, as in transformers since 5.23; the text model of earlier releases fails on them.
    """

    def __init__(self, checkpoint: Checkpoint, chosen: Slice, storage: Storage) -> None:
        super().__init__()
        self._checkpoint, self.storage = checkpoint, storage
        self._cut = chosen.source_of(PER_LAYER)
        self._count = checkpoint.spec(self._cut.source).shape[0]
        self._scale = chosen.config.hidden_size_per_layer_input**0.5

    def forward(self, ids: Tensor) -> Tensor:
        in_table = torch.where(ids < self._count, ids, 0)
        return as_stored(self._rows(in_table.reshape(-1).tolist()), self.storage).reshape(*ids.shape, -1)

    def sampled_error(self, storage: Storage, count: int = 64) -> float:
        """The norm of the storage error of some rows relative to their norm."""
        rows = self._rows(range(0, self._count, max(self._count // count, 1)))
        return float((as_stored(rows, storage) - rows).norm() / rows.norm())

    def _rows(self, ids: Iterable[int]) -> Tensor:
        rows = [read_cut(self._checkpoint, TensorCut(self._cut.source, ((i, i + 1),), self._cut.columns)) for i in ids]
        return torch.cat(rows).float() * self._scale


def _materialize_buffers(reference: nn.Module, config: Any) -> None:
    """Computes the buffers, which checkpoints do not contain, from the config."""
    for name, module in reference.named_modules():
        for key, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = _buffer_value(name, key, module, config)


def _buffer_value(name: str, key: str, module: nn.Module, config: Any) -> Tensor:
    if name.endswith("rotary_emb"):
        (rotary_embedding,) = _from_transformers("Gemma3nRotaryEmbedding")
        return dict(rotary_embedding(config).named_buffers())[key]
    values = {
        "embed_scale": getattr(module, "scalar_embed_scale", None),
        "router_input_scale": config.hidden_size**-1.0,
        "per_layer_projection_scale": config.hidden_size**-0.5,
        "per_layer_input_scale": 2.0**-0.5,
    }
    return torch.tensor(values[key])


def rounding_inputs(decoder: Any, storage_of: StorageOf) -> AbstractContextManager[None]:
    """In this context the decoder's quantized products round their activations to int8."""
    modules = {f"{name}.weight": module for name, module in decoder.model.named_modules()}
    modules[TOKENS if decoder.config.tie_word_embeddings else HEAD] = decoder.lm_head
    linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    return rounded({module: of_storage(storage_of(name)) for name, module in linear.items()})


def decoder_logits(decoder: nn.Module, ids: list[int], last: int) -> np.ndarray:
    """transformers' logits [last, V] at the last positions of `ids`."""
    with torch.no_grad():
        return decoder(torch.tensor([ids]), use_cache=False, logits_to_keep=last).logits[0].numpy()


def prefilled_logits(
    load: Callable[[StorageOf], nn.Module],
    storages: tuple[StorageOf, StorageOf],
    prompts: Sequence[list[int]],
    last: int,
    int8: bool = False,
) -> list[np.ndarray]:
    """transformers' logits [last, V] at the last positions of each prompt, computed by two decoders in turn.

    The first of `storages` is for the decoder that runs all but the last `last` tokens, the second for the decoder that
    runs the rest. Only one decoder is in memory at a time. `int8`: quantized products round their activations to int8.
    """
    with torch.no_grad():
        decoder = load(storages[0])
        cache = _name_of_cache(decoder)
        with rounding_inputs(decoder, storages[0]) if int8 else nullcontext():
            pasts = [decoder(torch.tensor([ids[:-last]]), logits_to_keep=1)[cache] for ids in prompts]
        del decoder
        decoder = load(storages[1])
        rests = [torch.tensor([ids[-last:]]) for ids in prompts]
        with rounding_inputs(decoder, storages[1]) if int8 else nullcontext():
            return [
                decoder(rest, **{cache: past}, logits_to_keep=last).logits[0].numpy()
                for rest, past in zip(rests, pasts)
            ]


def _name_of_cache(decoder: nn.Module) -> str:
    """transformers renamed the argument and output `past_key_values` to `cache` in 5.24."""
    return "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"


def load_encoder(
    checkpoint: Checkpoint, modality: str, storage_of: StorageOf = unchanged, products: str | None = None
) -> Encode:
    """transformers' encoder and embedder in fp32, with weights as `storage_of` says: inputs -> features [count, H].

    `products`: "int8" rounds the activations of quantized products, "bf16" all products and their inputs.

    Raises:
        ExportError: transformers cannot build the encoder.
    """
    config, vocab_size = _full_config(checkpoint), checkpoint.text_config.vocab_size
    section = getattr(config, f"{modality}_config")
    tower = _load(checkpoint, ENCODER_MODULES[modality][0], _build_tower(section, modality), storage_of)
    embedder = _load_embedder(checkpoint, config, modality, storage_of)
    roundings = {
        module: IN_BF16 if products == "bf16" else of_storage(storage_of(f"{prefix}.{name}.weight"))
        for prefix, part in zip(ENCODER_MODULES[modality], (tower, embedder))
        for name, module in part.named_modules()
        if _is_product(module)
    }

    @torch.no_grad()
    def see(pixel_values: np.ndarray) -> np.ndarray:
        found = tower(pixel_values=torch.from_numpy(pixel_values), do_pooling=False).last_hidden_state
        return embedder(inputs_embeds=found.flatten(2).mT * section.hidden_size**0.5).flatten(0, 1).numpy()

    @torch.no_grad()
    def hear(features: np.ndarray, mask: np.ndarray) -> np.ndarray:
        found = tower(torch.from_numpy(features), ~torch.from_numpy(mask))
        last_id = torch.tensor([[min(section.vocab_offset + section.vocab_size, vocab_size) - 1]])
        padding = embedder(input_ids=last_id)
        soft = torch.where(found.audio_mel_mask[..., None], padding, embedder(inputs_embeds=found.last_hidden_state))
        missing = padding.expand(len(soft), checkpoint.config["audio_soft_tokens_per_image"] - soft.shape[1], -1)
        return torch.cat([soft, missing], dim=1).flatten(0, 1).numpy()

    encode = see if modality == "vision" else hear

    def encode_rounding(*inputs: np.ndarray) -> np.ndarray:
        with rounded(roundings):
            return encode(*inputs)

    return encode if products is None else encode_rounding


def _is_product(module: nn.Module) -> bool:
    pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear) or pointwise


def load_hard_rows(checkpoint: Checkpoint, storage: Storage = "fp32") -> torch.Tensor:
    """Embeddings [n, H] of all hard tokens, as transformers computes them."""
    config = _full_config(checkpoint)
    rows = []
    for modality in ENCODER_MODULES:
        section = getattr(config, f"{modality}_config")
        ids = torch.arange(section.vocab_size)[None] + section.vocab_offset
        with torch.no_grad():
            rows.append(_load_embedder(checkpoint, config, modality, unchanged)(input_ids=ids)[0])
    scale = checkpoint.text_config.hidden_size**0.5
    return as_stored(torch.cat(rows) / scale, storage) * scale


def _full_config(checkpoint: Checkpoint) -> Any:
    (config_class,) = _from_transformers("Gemma3nConfig")
    return config_class(**checkpoint.config)


def _build_tower(section: Any, modality: str) -> nn.Module:
    (auto_model,) = _from_transformers("AutoModel")
    try:
        return auto_model.from_config(section, dtype=torch.float32)
    except (ImportError, RuntimeError) as error:
        raise ExportError(
            f"transformers cannot build the {modality} encoder ({_first_line(error)}); "
            "install the extra `verify`, or leave it out with --modalities."
        ) from error


def _load_embedder(checkpoint: Checkpoint, config: Any, modality: str, storage_of: StorageOf) -> nn.Module:
    (embedder_class,) = _from_transformers("Gemma3nMultimodalEmbedder")
    embedder = embedder_class(getattr(config, f"{modality}_config"), config.text_config)
    return _load(checkpoint, ENCODER_MODULES[modality][1], embedder, storage_of)


def _load(checkpoint: Checkpoint, name: str, module: nn.Module, storage_of: StorageOf) -> nn.Module:
    """The module in fp32 with the checkpoint's weights, rounded or quantized as `storage_of` says."""
    weights = {
        key: as_torch(checkpoint.raw_read(checkpoint.encoder_raw_name(f"{name}.{key}"))).float()
        for key in module.state_dict()
    }
    module = module.float().eval()
    stored = {key: as_stored(value, storage_of(f"{name}.{key}")) for key, value in weights.items()}
    module.load_state_dict(stored, strict=True, assign=True)
    return module
