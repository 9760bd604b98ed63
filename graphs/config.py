"""The architecture of a (sliced) Gemma 3n text decoder, read from a Hugging Face `config.json`."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

SLIDING = "sliding_attention"
FULL = "full_attention"
MOST = 1 << 24
"""The largest size or count of a config; the largest of Gemma 3n is its vocabulary, 262,400."""
MOST_LAYERS = 1024
SMALLEST, LARGEST = 1e-30, 1e30
"""Bounds of a number that only has to be positive."""
_MOST_SPARSE = 0.9999
Logits = Literal["last", "all"]
"""The positions that a decoder returns logits of."""


class ConfigError(ValueError):
    """The config is not a Gemma 3n that these graphs implement."""


@dataclass(frozen=True)
class TextConfig:
    """One text decoder; every per-layer tuple has `num_layers` entries."""

    vocab_size: int
    vocab_size_per_layer_input: int
    hidden_size: int
    hidden_size_per_layer_input: int
    intermediate_sizes: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_types: tuple[str, ...]
    num_kv_shared_layers: int
    activation_sparsity: tuple[float, ...]
    sliding_window: int
    rope_theta_full: float
    rope_theta_sliding: float
    rms_norm_eps: float
    laurel_rank: int
    altup_num_inputs: int
    altup_active_idx: int
    altup_correct_scale: bool
    final_logit_softcapping: float | None
    max_position_embeddings: int
    tied_head: bool = True
    """Whether the output head is the token embedding. Tensors decide it, so `from_hf` does not read it."""

    def __post_init__(self) -> None:
        layers = len(self.layer_types)
        for name in ("intermediate_sizes", "activation_sparsity"):
            if (found := len(getattr(self, name))) != layers:
                raise ConfigError(f"{name} has {found} entries for {layers} layers; it needs one for each layer.")
        if unknown := set(self.layer_types) - {SLIDING, FULL}:
            raise ConfigError(f"Unknown layer type {sorted(unknown)[0]!r}; only {SLIDING} and {FULL} are implemented.")
        if not 0 <= self.num_kv_shared_layers < layers:
            raise ConfigError(f"num_kv_shared_layers is {self.num_kv_shared_layers}; it must be below {layers}.")
        missing = set(self.layer_types) - set(self.layer_types[: self.num_kv_layers])
        if missing:
            raise ConfigError(
                f"A KV-shared layer has no donor: none of the first {self.num_kv_layers} layers "
                f"is of type {sorted(missing)[0]}."
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly.")
        if self.altup_active_idx != 0:
            raise ConfigError(f"altup_active_idx is {self.altup_active_idx}; only 0 is implemented.")

    @property
    def rope_theta(self) -> dict[str, float]:
        return {FULL: self.rope_theta_full, SLIDING: self.rope_theta_sliding}

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def num_kv_layers(self) -> int:
        """Layers that produce K and V; the others read a donor's. Also the number of caches."""
        return self.num_layers - self.num_kv_shared_layers

    def kv_source(self, layer: int) -> int:
        """The layer whose K and V `layer` reads: itself, or the last producer of its type."""
        if layer < self.num_kv_layers:
            return layer
        kind = self.layer_types[layer]
        return max(i for i in range(self.num_kv_layers) if self.layer_types[i] == kind)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> TextConfig:
        """Reads a full config (with `text_config`) or a text-only one, as transformers 4 or 5 writes it.

        Raises:
            ConfigError: not a Gemma 3n, a key is missing, or a value is not implemented.
        """
        text = config.get("text_config", config)
        if not isinstance(text, Mapping):
            raise ConfigError("text_config is not an object.")
        implied = "gemma3n_text" if config.get("model_type") == "gemma3n" else None
        if (model_type := text.get("model_type", implied)) != "gemma3n_text":
            raise ConfigError(f"model_type is {model_type!r}, not 'gemma3n_text': this is not a Gemma 3n config.")
        for key, wanted in (("hidden_activation", "gelu_pytorch_tanh"), ("attention_bias", False)):
            if (value := text.get(key, wanted)) != wanted:
                raise ConfigError(f"{key} is {value!r}; only {wanted!r} is implemented.")
        try:
            layers = count(text, "num_hidden_layers", MOST_LAYERS)
            width = text["intermediate_size"]
            sparsity = text.get("activation_sparsity_pattern")
            if sparsity is None:
                sparse_layers = 10 if layers > 10 else 0
                sparsity = [0.95] * sparse_layers + [0.0] * (layers - sparse_layers)
            elif isinstance(sparsity, float | int):
                sparsity = [sparsity] * layers
            return cls(
                vocab_size=count(text, "vocab_size"),
                vocab_size_per_layer_input=count(text, "vocab_size_per_layer_input"),
                hidden_size=count(text, "hidden_size"),
                hidden_size_per_layer_input=count(text, "hidden_size_per_layer_input"),
                intermediate_sizes=tuple(
                    count({"intermediate_size": w}, "intermediate_size")
                    for w in (width if isinstance(width, list | tuple) else [width] * layers)
                ),
                num_heads=count(text, "num_attention_heads"),
                num_kv_heads=count(text, "num_key_value_heads"),
                head_dim=count(text, "head_dim"),
                layer_types=_layer_types(text, layers),
                num_kv_shared_layers=int(text["num_kv_shared_layers"]),
                activation_sparsity=tuple(
                    number({"activation_sparsity": s}, "activation_sparsity", 0, _MOST_SPARSE) for s in sparsity
                ),
                sliding_window=count(text, "sliding_window"),
                rope_theta_full=_rope_theta(text, FULL, "rope_theta", 1_000_000.0),
                rope_theta_sliding=_rope_theta(text, SLIDING, "rope_local_base_freq", 10_000.0),
                rms_norm_eps=number(text, "rms_norm_eps", 0, 1),
                laurel_rank=count(text, "laurel_rank"),
                altup_num_inputs=count(text, "altup_num_inputs"),
                altup_active_idx=text["altup_active_idx"],
                altup_correct_scale=text.get("altup_correct_scale", True),
                final_logit_softcapping=(
                    None
                    if text.get("final_logit_softcapping", 30.0) is None
                    else number(text, "final_logit_softcapping", SMALLEST, LARGEST, 30.0)
                ),
                max_position_embeddings=count(text, "max_position_embeddings"),
            )
        except KeyError as error:
            raise ConfigError(f"The Gemma 3n text config has no {error.args[0]!r}.") from error
        except ConfigError:
            raise
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ConfigError(f"A value of the Gemma 3n text config has the wrong type ({error}).") from error


def count(values: Mapping[str, Any], key: str, most: int = MOST) -> int:
    """`values[key]`, an integer from 1 to `most`.

    Raises:
        ConfigError: it is not.
        KeyError: it is missing.
    """
    value = values[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ConfigError(f"{key} is {reprlib.repr(value)}; it must be a positive whole number up to {most:,}.")
    return value


def number(values: Mapping[str, Any], key: str, low: float, high: float, default: float | None = None) -> float:
    """`values[key]`, or the default, a number from `low` to `high`.

    Raises:
        ConfigError: it is not.
        KeyError: it is missing, and there is no default.
    """
    value = values[key] if default is None else values.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:  # NaN is not
        raise ConfigError(f"{key} is {reprlib.repr(value)}; it must be a number from {low:g} to {high:g}.")
    return float(value)


def _layer_types(text: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    if text.get("layer_types"):
        types = tuple(text["layer_types"])
        if len(types) != layers:
            raise ConfigError(f"layer_types has {len(types)} entries for {layers} layers.")
        return types
    return tuple(FULL if (i + 1) % 5 == 0 else SLIDING for i in range(layers))


def _rope_theta(text: Mapping[str, Any], kind: str, flat_key: str, default: float) -> float:
    """From `rope_parameters` (transformers 5) or the flat key of transformers 4, whose `rope_scaling` is for the full
    layers only."""
    parameters = dict((text.get("rope_parameters") or {}).get(kind) or {})
    if kind == FULL:
        parameters |= text.get("rope_scaling") or {}
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type != "default":
        raise ConfigError(f"rope_type of the {kind} layers is {rope_type!r}; only 'default' is implemented.")
    return number({flat_key: parameters.get("rope_theta", text.get(flat_key, default))}, flat_key, 1, LARGEST)
