"""Parameters and disk size of slices, and the table that `gemma3n slices` prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gemma3n_onnx.export.errors import SliceError
from gemma3n_onnx.export.quantization.recipes import precision_for
from gemma3n_onnx.export.slicing import SliceSpec, load_slices, resolve
from gemma3n_onnx.export.text_weights import lay_out_prefill, lay_out_text
from gemma3n_onnx.graphs.config import FULL, SLIDING, ConfigError, TextConfig

STORED = ("fp32", "fp16", "int8", "int4")
"""The precisions in the table; bf16 has the size of fp16."""

VISION_TOWER_PARAMETERS = {"mobilenetv5_300m_enc": 294_126_912}
"""By timm architecture, as timm 1.0.17 and later build it."""

STEM_BIAS_PARAMETERS = 64
"""The stem convolution's bias, which timm 1.0.16 did not have when the totals were published."""

_PATTERN = (SLIDING,) * 4 + (FULL,)

E4B = TextConfig(
    vocab_size=262_400,
    vocab_size_per_layer_input=262_144,
    hidden_size=2048,
    hidden_size_per_layer_input=256,
    intermediate_sizes=(16384,) * 35,
    num_heads=8,
    num_kv_heads=2,
    head_dim=256,
    layer_types=_PATTERN * 7,
    num_kv_shared_layers=15,
    activation_sparsity=(0.95,) * 10 + (0.0,) * 25,
    sliding_window=512,
    rope_theta_full=1_000_000.0,
    rope_theta_sliding=10_000.0,
    rms_norm_eps=1e-6,
    laurel_rank=64,
    altup_num_inputs=4,
    altup_active_idx=0,
    altup_correct_scale=True,
    final_logit_softcapping=30.0,
    max_position_embeddings=32768,
)
"""The decoder of google/gemma-3n-E4B, for a table without a checkpoint."""

E4B_CONFIG: Mapping[str, Any] = {
    "text_config": {"hidden_size": 2048},
    "vision_config": {"architecture": "mobilenetv5_300m_enc", "hidden_size": 2048, "vocab_size": 128},
    "audio_config": {
        "hidden_size": 1536,
        "vocab_size": 128,
        "input_feat_size": 128,
        "conf_num_attention_heads": 8,
        "conf_num_hidden_layers": 12,
        "conf_conv_kernel_size": 5,
        "sscp_conv_channel_size": (128, 32),
        "sscp_conv_kernel_size": ((3, 3), (3, 3)),
        "sscp_conv_stride_size": ((2, 2), (2, 2)),
    },
}
"""The parts of its `config.json` that determine the encoders' sizes."""


@dataclass(frozen=True)
class DecoderParameters:
    """Parameters of a text decoder, counted as Google counts them.

    The published figures include the K and V projections of all layers, as the checkpoints do. KV-shared layers never
    read theirs (`unused_kv`); exported graphs omit them.
    """

    text: int
    ple_table: int
    token_embedding: int
    """Also the size of the output head, which `text` counts unless it is tied."""
    unused_kv: int

    @property
    def effective(self) -> int:
        """Parameters in accelerator memory: all but the two tables, of which only rows are read."""
        return self.text - self.ple_table - self.token_embedding


def parameter_counts(config: TextConfig) -> DecoderParameters:
    """The parameters of a decoder of this shape, without reading a checkpoint."""
    hidden, ple, streams = config.hidden_size, config.hidden_size_per_layer_input, config.altup_num_inputs
    query = config.num_heads * config.head_dim
    kv_per_layer = 2 * config.num_kv_heads * config.head_dim * hidden + config.head_dim
    attention = 2 * query * hidden + config.head_dim + kv_per_layer
    laurel = 2 * config.laurel_rank * hidden + hidden
    altup = 2 * hidden + streams * hidden + streams**2 + streams**3
    ple_gate = 2 * ple * hidden + hidden
    layer_norms = 4 * hidden
    layer = attention + laurel + altup + ple_gate + layer_norms
    feed_forward = 3 * hidden * sum(config.intermediate_sizes)

    token_embedding = config.vocab_size * hidden
    ple_table = config.vocab_size_per_layer_input * config.num_layers * ple
    ple_projection = config.num_layers * ple * hidden + ple
    stream_projections = 2 * (streams - 1) * hidden**2
    head = 0 if config.tied_head else token_embedding
    outside = token_embedding + head + ple_table + ple_projection + stream_projections + hidden
    return DecoderParameters(
        text=outside + config.num_layers * layer + feed_forward,
        ple_table=ple_table,
        token_embedding=token_embedding,
        unused_kv=config.num_kv_shared_layers * kv_per_layer,
    )


def encoder_parameter_counts(hf_config: Mapping[str, Any]) -> dict[str, int]:
    """Parameters of `vision_tower`, `embed_vision`, `audio_tower` and `embed_audio` in a full `config.json`.

    Raises:
        ConfigError: a section or a key is missing.
        SliceError: the vision tower is not a known timm architecture at full width.
    """
    try:
        vision, audio = hf_config["vision_config"], hf_config["audio_config"]
        hidden = hf_config["text_config"]["hidden_size"]
        architecture = vision.get("architecture", "mobilenetv5_300m_enc")
        if architecture not in VISION_TOWER_PARAMETERS or vision.get("model_args"):
            raise SliceError(
                f"The parameters of vision tower {architecture!r} with model_args "
                f"{vision.get('model_args')} are not "
                f"known; only {', '.join(VISION_TOWER_PARAMETERS)} without model_args is supported."
            )
        return {
            "vision_tower": VISION_TOWER_PARAMETERS[architecture],
            "embed_vision": _embedder(vision, hidden),
            "audio_tower": _audio_tower(audio),
            "embed_audio": _embedder(audio, hidden),
        }
    except KeyError as error:
        raise ConfigError(f"The Gemma 3n config has no {error.args[0]!r}.") from error


def _embedder(config: Mapping[str, Any], text_hidden: int) -> int:
    hidden = config["hidden_size"]
    norms = 2 * hidden
    return config["vocab_size"] * hidden + norms + text_hidden * hidden


def _audio_tower(audio: Mapping[str, Any]) -> int:
    hidden = audio["hidden_size"]
    feed_forward = 2 * (4 * hidden) * hidden + 2 * hidden
    # Five square matrices: q, k, v, the relative position's and the output projection.
    attention = 5 * hidden**2 + hidden // audio["conf_num_attention_heads"] + 2 * hidden
    convolution = 3 * hidden**2 + audio["conf_conv_kernel_size"] * hidden + 2 * hidden
    conformer = audio["conf_num_hidden_layers"] * (2 * feed_forward + attention + convolution + hidden)

    subsampling, channels, bins = 0, 1, audio["input_feat_size"]
    for out_channels, (time_kernel, bin_kernel), (_, bin_stride) in zip(
        audio["sscp_conv_channel_size"], audio["sscp_conv_kernel_size"], audio["sscp_conv_stride_size"]
    ):
        subsampling += out_channels * channels * time_kernel * bin_kernel + out_channels
        channels, bins = out_channels, (bins + 2 - bin_kernel) // bin_stride + 1
    return subsampling + channels * bins * hidden + conformer


def published_total(config: TextConfig, hf_config: Mapping[str, Any]) -> int:
    """All parameters, counted like the published totals.

    The count has the decoder, the four encoder parts as of timm 1.0.16, and the output head even if it is tied to the
    token embedding.

    Raises:
        ConfigError, SliceError: see `encoder_parameter_counts`.
    """
    counts = parameter_counts(config)
    encoders = sum(encoder_parameter_counts(hf_config).values()) - STEM_BIAS_PARAMETERS
    return counts.text + (counts.token_embedding if config.tied_head else 0) + encoders


def disk_bytes(config: TextConfig, precision: str) -> int:
    """Bytes of the weights of an exported decoder, its two tables and its prefill graph, without encoders and
    multimodal rows.

    A tied output head is the token table: both graphs read the same file.

    Raises:
        ExportOptionError: no such precision.
    """
    recipe = precision_for(precision, "cpu")
    weights = lay_out_text(config, recipe, None)
    own_of_prefill = lay_out_prefill(config, recipe, weights)
    return sum(stored.nbytes for stored in (*weights.values(), *own_of_prefill.values()))


@dataclass(frozen=True)
class SliceRow:
    """One line of `gemma3n slices`."""

    name: str
    layers: int
    effective: int
    text: int
    total: int | None
    """With the encoders, as published; None for a text-only checkpoint or reduced encoders."""
    published_effective_b: float | None
    mmlu: float | None
    disk_bytes: Mapping[str, int]
    """By precision."""


def slices_table(
    config: TextConfig = E4B, hf_config: Mapping[str, Any] = E4B_CONFIG, specs: Iterable[SliceSpec] | None = None
) -> list[SliceRow]:
    """The slices that can be cut from a checkpoint; larger ones are left out.

    `config` is its decoder, `hf_config` its `config.json`.
    """
    rows = []
    for spec in load_slices().specs if specs is None else specs:
        try:
            sliced = resolve(spec, config).config
        except SliceError:
            continue
        counts = parameter_counts(sliced)
        rows.append(
            SliceRow(
                spec.name,
                sliced.num_layers,
                counts.effective,
                counts.text,
                _total(sliced, hf_config),
                spec.effective_params_b,
                spec.mmlu,
                {precision: disk_bytes(sliced, precision) for precision in STORED},
            )
        )
    return rows


def _total(config: TextConfig, hf_config: Mapping[str, Any]) -> int | None:
    try:
        return published_total(config, hf_config)
    except (ConfigError, SliceError):
        return None


SMALL_MODEL = 100_000_000
"""With fewer text parameters the table is in millions."""


def render_table(rows: Iterable[SliceRow]) -> str:
    """Aligned columns, one line a slice; parameters in billions and disk in 10^9 bytes, of small models in millions."""
    rows = list(rows)
    unit, byte_unit, scale = ("M", "MB", 1e6) if max(row.text for row in rows) < SMALL_MODEL else ("B", "GB", 1e9)
    disk = tuple(f"{precision} {byte_unit}" for precision in STORED)
    lines = [
        ("name", "layers", f"effective {unit}", f"published {unit}", f"text {unit}", f"total {unit}", "MMLU %", *disk)
    ]
    for row in rows:
        lines.append(
            (
                row.name,
                str(row.layers),
                f"{row.effective / scale:.2f}",
                "-" if row.published_effective_b is None else f"{row.published_effective_b * 1e9 / scale:.2f}",
                f"{row.text / scale:.2f}",
                "-" if row.total is None else f"{row.total / scale:.2f}",
                "-" if row.mmlu is None else f"{row.mmlu:.1f}",
                *(f"{row.disk_bytes[precision] / scale:.1f}" for precision in STORED),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in lines
    )
