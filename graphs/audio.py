"""The audio encoder, written to be traced: mel frames to soft tokens of the decoder's width.

Two convolutions of stride 2, a conformer whose attention covers the current and the previous chunk, and one
soft token for every fourth step. Parameters have the checkpoint's names below `model.`.

Sources of the maths: the Gemma 3n modules of Hugging Face transformers; the Universal Speech Model
(arXiv:2303.01037).

Shape legend: n clips, T mel frames (10 ms), S = ceil(T / 4) steps (40 ms), U = ceil(S / W) chunks of W steps,
P = U * W padded steps, R = n * S rows, C = 2 * W context steps, K relative positions, H hidden, N heads, D head size,
B mel bins, t = ceil(T / 16) tokens (160 ms), G text hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .config import LARGEST, MOST, MOST_LAYERS, SMALLEST, ConfigError, count, number
from .embedder import MultimodalEmbedder
from .layers import Linear, RMSNorm, Weight
from .repeated import repeated

_MOST_STEPS = 1024
_EPS = 1e-6  # of the norms that ignore `rms_norm_eps`
_CLAMP = 1e10
_VOCAB_OFFSET = 262_144 + 128  # text and vision
_FREQUENCY_PADDING = 1  # on both sides


@dataclass(frozen=True)
class AudioConfig:
    """One audio encoder with its embedder. Kernels and strides are (time, frequency), one pair per convolution."""

    text_hidden_size: int
    soft_tokens: int = 188
    vocab_size: int = 128
    padding_row: int = 127
    """The row of the embedder's table that pads a clip: that of the vocabulary's last id, or of the last audio id if
    ids have been added to the vocabulary."""
    mel_bins: int = 128
    hidden_size: int = 1536
    num_heads: int = 8
    num_layers: int = 12
    chunk_size: int = 12
    context_left: int = 13
    logit_cap: float = 50.0
    conv_kernel_size: int = 5
    reduction_factor: int = 4
    residual_weight: float = 0.5
    rms_norm_eps: float = 1e-6
    subsample_channels: tuple[int, ...] = (128, 32)
    subsample_kernels: tuple[tuple[int, int], ...] = ((3, 3), (3, 3))
    subsample_strides: tuple[tuple[int, int], ...] = ((2, 2), (2, 2))
    group_norm_eps: float = 1e-3

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.hidden_size % 2:
            raise ConfigError(
                f"The audio encoder's hidden_size is {self.hidden_size}; it must be even and a multiple of its "
                f"{self.num_heads} heads."
            )
        if self.chunk_size > _MOST_STEPS:  # the mask of a chunk has its square
            raise ConfigError(
                f"conf_attention_chunk_size is {self.chunk_size}; only chunks of up to {_MOST_STEPS} are implemented."
            )
        if not 1 <= self.context_left <= self.chunk_size + 1:
            raise ConfigError(
                f"conf_attention_context_left is {self.context_left}; only 1 to the chunk size plus one "
                f"({self.chunk_size + 1}) is implemented."
            )
        for name in ("channels", "kernels", "strides"):
            if (found := len(getattr(self, f"subsample_{name}"))) != 2:
                raise ConfigError(f"The audio encoder has {found} subsampling {name}; it needs two.")
        if self.frequencies[-1] < 1:
            raise ConfigError(f"{self.mel_bins} mel bins are too few for the subsampling convolutions.")

    @property
    def frames_per_step(self) -> int:
        """Mel frames per conformer step."""
        return math.prod(time for time, _ in self.subsample_strides)

    @property
    def frequencies(self) -> tuple[int, ...]:
        """Width of the frequency axis before, between and after the two convolutions."""
        sizes = [self.mel_bins]
        for (_, kernel), (_, stride) in zip(self.subsample_kernels, self.subsample_strides):
            sizes.append((sizes[-1] + 2 * _FREQUENCY_PADDING - kernel) // stride + 1)
        return tuple(sizes)

    @property
    def max_distance(self) -> int:
        """How many earlier steps a step attends to."""
        return self.context_left - 1

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> AudioConfig:
        """Reads a full config (`audio_config` and `text_config` inside); missing keys of `audio_config` have defaults.

        Raises:
            ConfigError: no audio encoder, a key is missing, or a value is not implemented.
        """
        audio, text = config.get("audio_config"), config.get("text_config")
        if not isinstance(audio, Mapping):
            raise ConfigError("The config has no audio_config: this checkpoint has no audio encoder.")
        if not isinstance(text, Mapping) or "hidden_size" not in text:
            raise ConfigError("The config has no text_config.hidden_size, the width of the audio features.")
        if (model_type := audio.get("model_type", "gemma3n_audio")) != "gemma3n_audio":
            raise ConfigError(f"audio_config.model_type is {model_type!r}; only 'gemma3n_audio' is implemented.")
        if (right := audio.get("conf_attention_context_right", 0)) != 0:
            raise ConfigError(f"conf_attention_context_right is {right!r}; only 0 is implemented.")
        try:
            number(audio, "gradient_clipping", _CLAMP, LARGEST, _CLAMP)  # values below are not implemented
            vocab_size = _count(audio, "vocab_size", cls.vocab_size)
            first = _count(audio, "vocab_offset", _VOCAB_OFFSET)
            vocabulary = _count(text, "vocab_size", first + vocab_size)
            if vocabulary <= first:
                raise ConfigError(f"The vocabulary has {vocabulary} ids, and the audio ids begin at {first}.")
            return cls(
                text_hidden_size=_count(text, "hidden_size", None),
                soft_tokens=_count(config, "audio_soft_tokens_per_image", cls.soft_tokens),
                vocab_size=vocab_size,
                padding_row=min(vocabulary - first, vocab_size) - 1,
                mel_bins=_count(audio, "input_feat_size", cls.mel_bins),
                hidden_size=_count(audio, "hidden_size", cls.hidden_size),
                num_heads=_count(audio, "conf_num_attention_heads", cls.num_heads),
                num_layers=_count(audio, "conf_num_hidden_layers", cls.num_layers, MOST_LAYERS),
                chunk_size=_count(audio, "conf_attention_chunk_size", cls.chunk_size),
                context_left=_count(audio, "conf_attention_context_left", cls.context_left),
                logit_cap=number(audio, "conf_attention_logit_cap", SMALLEST, LARGEST, cls.logit_cap),
                conv_kernel_size=_count(audio, "conf_conv_kernel_size", cls.conv_kernel_size),
                reduction_factor=_count(audio, "conf_reduction_factor", cls.reduction_factor),
                residual_weight=number(audio, "conf_residual_weight", -LARGEST, LARGEST, cls.residual_weight),
                rms_norm_eps=number(audio, "rms_norm_eps", 0, 1, cls.rms_norm_eps),
                subsample_channels=_counts(audio, "sscp_conv_channel_size", cls.subsample_channels),
                subsample_kernels=_pairs(audio, "sscp_conv_kernel_size", cls.subsample_kernels),
                subsample_strides=_pairs(audio, "sscp_conv_stride_size", cls.subsample_strides),
                group_norm_eps=number(audio, "sscp_conv_group_norm_eps", 0, 1, cls.group_norm_eps),
            )
        except ConfigError:
            raise
        except (TypeError, ValueError) as error:
            raise ConfigError(f"A value of the audio config has the wrong type ({error}).") from error


def _count(values: Mapping[str, Any], key: str, default: int | None, most: int = MOST) -> int:
    return count({key: values.get(key, default)}, key, most)


def _counts(values: Mapping[str, Any], key: str, default: Sequence[int]) -> tuple[int, ...]:
    return tuple(count({key: value}, key) for value in values.get(key, default))


def _pairs(values: Mapping[str, Any], key: str, default: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    pairs = [tuple(count({key: value}, key) for value in pair) for pair in values.get(key, default)]
    if any(len(pair) != 2 for pair in pairs):
        raise ConfigError(f"{key} is {values[key]!r}; each entry must be a pair (time, frequency).")
    return tuple((pair[0], pair[1]) for pair in pairs)


def checkpoint_shapes(config: AudioConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the encoder and its embedder, by its name in a checkpoint below `model.`."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in AudioEncoder(config).named_parameters()}


class CumulativeGroupNorm(Weight):
    """Normalizes each step by mean and variance over the channels and frequencies of this and all earlier steps.

    The variance sums each step's deviations from the mean up to that step.
    """

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(channels)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [n, channels, time, frequency] -> the same shape."""
        steps = ops.count_to(ops.size_of_axis(x, 2)) + 1
        count = (steps * (x.shape[1] * x.shape[3])).float().unsqueeze(1)
        centered = x - _sum_of_frames(x).cumsum(1).unsqueeze(1) / count
        variance = _sum_of_frames(centered.square()).cumsum(1).unsqueeze(1) / count
        return centered * (torch.rsqrt(variance + self.eps) * self.weight.unsqueeze(1).unsqueeze(2))


def _sum_of_frames(x: Tensor) -> Tensor:
    """[n, channels, time, frequency] -> [n, time, 1]."""
    return x.sum(3, keepdim=True).sum(1)


class SubsampleBlock(nn.Module):
    """Convolution (padded at the end of time, so not causal), norm and ReLU.

    [n, in, time, frequency] -> [n, out, ceil(time / stride), a smaller frequency].
    """

    def __init__(self, config: AudioConfig, index: int) -> None:
        super().__init__()
        channels = (1, *config.subsample_channels)
        kernel = config.subsample_kernels[index]
        self.stride = config.subsample_strides[index]
        self.padding = (_FREQUENCY_PADDING, _FREQUENCY_PADDING, 0, kernel[0] - 1)
        self.conv = Weight(channels[index + 1], channels[index], *kernel)
        self.norm = CumulativeGroupNorm(channels[index + 1], config.group_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(F.pad(x, self.padding), self.conv.weight, stride=self.stride)
        return F.relu(self.norm(x))


class Subsample(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.width = config.subsample_channels[-1] * config.frequencies[-1]
        self.conv_0 = SubsampleBlock(config, 0)
        self.conv_1 = SubsampleBlock(config, 1)
        self.input_proj_linear = Linear(self.width, config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """features [n, T, B] -> [R, H]."""
        x = self.conv_1(self.conv_0(features.unsqueeze(1))).permute(0, 2, 3, 1)
        return self.input_proj_linear(ops.reshape(x, -1, self.width))


@dataclass
class AttentionChunks:
    """Values that all layers share in one run."""

    clips: ops.Size  # n
    steps: ops.Size  # S
    padded: ops.Size  # P
    valid: Tensor  # [R, 1], 1.0 or 0.0
    mask: Tensor  # [n * U, W, C], added to the attention logits


class RelativePosition(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.pos_proj = Linear(config.hidden_size, config.hidden_size)


class ChunkedAttention(nn.Module):
    """Each step attends to at most `max_distance` steps before it and to itself, with relative positions.

    Clips are padded to whole chunks only here: the projections, nearly all of the work, run on R rows.
    """

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.heads, self.head_dim = config.num_heads, hidden // config.num_heads
        self.chunk, self.cap = config.chunk_size, config.logit_cap
        self.max_distance = config.max_distance
        self.relative_position_embedding = RelativePosition(config)
        self.per_dim_scale = nn.Parameter(torch.zeros(self.head_dim))
        self.q_proj = Linear(hidden, hidden)
        self.k_proj = Linear(hidden, hidden)
        self.v_proj = Linear(hidden, hidden)

    def forward(self, x: Tensor, positions: Tensor, chunks: AttentionChunks) -> Tensor:
        """x [R, H], positions [K, H] -> [R, H]."""
        query = self._by_head(self.q_proj(x), chunks) * self._query_scale()
        key, value = (self._context(self._by_head(proj(x), chunks), chunks) for proj in (self.k_proj, self.v_proj))
        query = self._chunked(ops.fit(query, 2, chunks.padded))
        logits = torch.matmul(query, key.transpose(2, 3)) + self._position_logits(query, positions)
        weights = (torch.tanh(logits) * self.cap + chunks.mask).softmax(-1)
        attended = ops.reshape(torch.matmul(weights, value), self.heads, chunks.clips, -1, self.head_dim)
        attended = ops.fit(attended, 2, chunks.steps).permute(1, 2, 0, 3)
        return ops.reshape(attended, -1, self.heads * self.head_dim)

    def _query_scale(self) -> Tensor:
        """[D]; includes the division of the logits by the softcap."""
        return ops.softplus(self.per_dim_scale) * (self.head_dim**-0.5 / math.log(2) / self.cap)

    def _by_head(self, x: Tensor, chunks: AttentionChunks) -> Tensor:
        """[R, H] -> [N, n, S, D]."""
        return ops.reshape(x, chunks.clips, -1, self.heads, self.head_dim).permute(2, 0, 1, 3)

    def _context(self, x: Tensor, chunks: AttentionChunks) -> Tensor:
        """[N, n, S, D] -> [N, n * U, C, D]: each chunk preceded by the previous one, the first one by zeros."""
        before, own = (self._chunked(ops.fit(x, 2, chunks.padded, zeros)) for zeros in (self.chunk, 0))
        return torch.cat([before, own], dim=2)

    def _chunked(self, x: Tensor) -> Tensor:
        """[N, n, P, D] -> [N, n * U, W, D]."""
        return ops.reshape(x, self.heads, -1, self.chunk, self.head_dim)

    def _position_logits(self, query: Tensor, positions: Tensor) -> Tensor:
        """query [N, n * U, W, D] -> [N, n * U, W, C], at (w, c) for the distance w + W - c.

        The relative shift: rows of length C + 1, reshaped to length C, move by one with each w.
        """
        context = 2 * self.chunk
        projected = self.relative_position_embedding.pos_proj(positions)
        by_head = projected.reshape(-1, self.heads, self.head_dim).permute(1, 2, 0)
        first = self.chunk - self.max_distance
        table = F.pad(by_head, (first, context - first - self.max_distance))
        logits = torch.matmul(ops.reshape(query, self.heads, -1, self.head_dim), table)
        rows = ops.reshape(logits, self.heads, -1, self.chunk * (context + 1))[..., : self.chunk * context]
        return ops.reshape(rows, self.heads, -1, self.chunk, context)


class ConformerAttention(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.pre_attn_norm = RMSNorm(config.hidden_size, _EPS)
        self.attn = ChunkedAttention(config)
        self.post = Linear(config.hidden_size, config.hidden_size)
        self.post_norm = RMSNorm(config.hidden_size, _EPS)

    def forward(self, x: Tensor, positions: Tensor, chunks: AttentionChunks) -> Tensor:
        attended = self.attn(self.pre_attn_norm(x), positions, chunks)
        return x + self.post_norm(self.post(attended))


class FeedForward(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.residual_weight = config.residual_weight
        self.pre_layer_norm = RMSNorm(config.hidden_size, _EPS)
        self.ffw_layer_1 = Linear(config.hidden_size, 4 * config.hidden_size)
        self.ffw_layer_2 = Linear(4 * config.hidden_size, config.hidden_size)
        self.post_layer_norm = RMSNorm(config.hidden_size, _EPS)

    def forward(self, x: Tensor) -> Tensor:
        out = self.ffw_layer_2(F.silu(self.ffw_layer_1(self.pre_layer_norm(x))))
        return x + self.post_layer_norm(out, self.residual_weight)


class LightConvolution(nn.Module):
    """Gated projection, causal convolution of each channel over time, projection.

    With `keep` > 1, the convolution and what follows run for every `keep`-th step only.
    """

    def __init__(self, config: AudioConfig, keep: int) -> None:
        super().__init__()
        hidden, self.kernel, self.keep = config.hidden_size, config.conv_kernel_size, keep
        self.pre_layer_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.linear_start = Linear(hidden, 2 * hidden)
        self.depthwise_conv1d = Weight(hidden, 1, self.kernel)
        self.conv_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.linear_end = Linear(hidden, hidden)

    def forward(self, x: Tensor, chunks: AttentionChunks) -> Tensor:
        """x [R, H] -> [n * ceil(S / keep), H]."""
        hidden = x.shape[1]
        gated = F.glu(self.linear_start(self.pre_layer_norm(x)), dim=-1)
        by_time = F.pad(ops.reshape(gated, chunks.clips, -1, hidden).transpose(1, 2), (self.kernel - 1, 0))
        mixed = F.conv1d(by_time, self.depthwise_conv1d.weight, stride=self.keep, groups=hidden)
        mixed = ops.reshape(mixed.transpose(1, 2), -1, hidden)
        if self.keep > 1:
            x = ops.reshape(ops.reshape(x, chunks.clips, -1, hidden)[:, :: self.keep], -1, hidden)
        return x + self.linear_end(F.silu(self.conv_norm(mixed)))


class ConformerBlock(nn.Module):
    def __init__(self, config: AudioConfig, keep: int) -> None:
        super().__init__()
        self.ffw_layer_start = FeedForward(config)
        self.attention = ConformerAttention(config)
        self.lconv1d = LightConvolution(config, keep)
        self.ffw_layer_end = FeedForward(config)
        self.norm = RMSNorm(config.hidden_size, _EPS)

    def forward(self, x: Tensor, positions: Tensor, chunks: AttentionChunks) -> Tensor:
        """x [R, H] -> [n * ceil(S / keep), H]."""
        x = self.attention(self.ffw_layer_start(x), positions, chunks)
        return self.norm(self.ffw_layer_end(self.lconv1d(x * chunks.valid, chunks)))


class AudioTower(nn.Module):
    """The encoder without its embedder, for fp32.

    transformers clamps activations at 1e10 in eight places of a block. A normed value is at most sqrt(H) times its
    weight, and at most two linear layers lie between norms: in fp32 no clamp has an effect, so clamps are omitted, and
    a config with a lower limit is rejected. fp16 would overflow long before.
    """

    positions: Tensor
    reach: Tensor

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        self.subsample_conv_projection = Subsample(config)
        last = config.num_layers - 1
        self.conformer: Sequence[ConformerBlock] = nn.ModuleList(  # type: ignore[assignment]
            ConformerBlock(config, config.reduction_factor if i == last else 1) for i in range(config.num_layers)
        )
        self.register_buffer("positions", _sinusoid(config.max_distance, config.hidden_size), persistent=False)
        self.register_buffer("reach", _reach(config), persistent=False)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """features [n, T, B], mask [n, T] -> [n * t, H]; tokens without a valid frame are undefined."""
        chunks = self._chunks(mask)
        x = self.subsample_conv_projection(features)
        for block in self.conformer:
            x = repeated(block.forward, x, self.positions, chunks)
        return x

    def _chunks(self, mask: Tensor) -> AttentionChunks:
        size, clips = self.config.chunk_size, ops.size_of_axis(mask, 0)
        valid = mask[:, :: self.config.frames_per_step].float()
        steps = ops.size_of_axis(valid, 1)
        count = ops.ceil_divide(steps, size)
        padded = ops.Size(count.number * size, count.tensor * size)
        parts = [ops.reshape(ops.fit(valid, 1, padded, zeros), -1, 1, size) for zeros in (size, 0)]
        forbidden = 1.0 - torch.cat(parts, dim=2) * self.reach
        least = torch.finfo(torch.float32).min
        return AttentionChunks(clips, steps, padded, ops.reshape(valid, -1, 1), forbidden * least)


def _sinusoid(max_distance: int, width: int) -> Tensor:
    """[max_distance + 1, width]: sines, then cosines, of the distances in descending order."""
    count = width // 2
    rates = torch.exp(torch.arange(count, device="cpu") * (-math.log(1e4) / max(count - 1, 1)))
    angles = torch.arange(max_distance, -1, -1, device="cpu").float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _reach(config: AudioConfig) -> Tensor:
    """[W, C], 1.0 where step w of a chunk may attend to c of its context."""
    own = torch.arange(config.chunk_size, device="cpu")[:, None] + config.chunk_size
    distance = own - torch.arange(2 * config.chunk_size, device="cpu")
    return ((distance >= 0) & (distance <= config.max_distance)).float()


class AudioEncoder(nn.Module):
    """Mel frames -> the soft tokens of a clip.

    Tokens without a valid frame, and the padding up to `soft_tokens`, are the hard embedding of `padding_row`.
    """

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        self.audio_tower = AudioTower(config)
        self.embed_audio = MultimodalEmbedder(
            config.vocab_size, config.hidden_size, config.text_hidden_size, config.rms_norm_eps
        )

    def forward(self, input_features: Tensor, input_features_mask: Tensor) -> Tensor:
        """input_features [n, T, B] fp32, input_features_mask [n, T] bool (True: valid) -> [n * soft_tokens, G] fp32."""
        soft = self.embed_audio.soft(self.audio_tower(input_features, input_features_mask))
        row = self.config.padding_row
        padding = self.embed_audio.hard(self.embed_audio.embedding.weight[row : row + 1])
        clips, width = ops.size_of_axis(input_features, 0), self.config.text_hidden_size
        frames_per_token = self.config.frames_per_step * self.config.reduction_factor
        valid = input_features_mask[:, ::frames_per_token].unsqueeze(2)
        present = torch.where(valid, ops.reshape(soft, clips, -1, width), padding)
        count = ops.size_of_axis(present, 1)
        missing = ops.expand(padding.unsqueeze(0), clips, ops.difference(self.config.soft_tokens, count), width)
        return ops.reshape(torch.cat([present, missing], dim=1), -1, width)
