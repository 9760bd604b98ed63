"""The vision encoder: MobileNet-V5 and the projection of its features to the decoder's width.

Parameters have the checkpoint's names. A feature map is laid out as rows of channels, [T, C] with T = images *
height * width: a pointwise convolution is then a matrix product with the checkpoint's weight, and RMSNorm runs over
the last axis. Only spatial convolutions use [n, C, h, w].

Sources of the maths: `mobilenetv5_300m_enc` of timm; MobileNetV4 (arXiv:2404.10518) for its two kinds of block,
the universal inverted bottleneck and the attention with one key and value head.

Shape legend: n images, h and w height and width of the current feature map, T = n * h * w, C channels,
K key and value positions of an image, N heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .config import ConfigError, count, number
from .embedder import MultimodalEmbedder
from .layers import Linear, RMSNorm, Weight
from .repeated import repeated

ARCHITECTURE = "mobilenetv5_300m_enc"
TOWER = "vision_tower.timm_model."

NORM_EPS = 1e-6  # of the tower's own norms
STEM_WIDTH = 64
OUTPUT_SIDE = 16  # height and width of the tower's output, for any image size
FUSED_STAGES = (2, 3)


@dataclass(frozen=True)
class EdgeSpec:
    """A 3x3 expansion by 4 and a projection."""

    width: int
    stride: int = 1


@dataclass(frozen=True)
class BottleneckSpec:
    """A universal inverted bottleneck. A kernel of 0 omits the depthwise convolution."""

    width: int
    start_kernel: int
    middle_kernel: int
    expansion: int
    stride: int = 1


@dataclass(frozen=True)
class AttentionSpec:
    """Attention in which `num_heads` query heads share one key and value head."""

    width: int
    num_heads: int
    head_dim: int
    kv_stride: int


BlockSpec = EdgeSpec | BottleneckSpec | AttentionSpec


def _attention_stage(attention: AttentionSpec, count: int) -> tuple[BlockSpec, ...]:
    return (attention, BottleneckSpec(attention.width, 0, 0, 2)) * count


STAGES: tuple[tuple[BlockSpec, ...], ...] = (
    (EdgeSpec(128, stride=2), EdgeSpec(128), EdgeSpec(128)),
    (
        BottleneckSpec(256, 3, 5, 6, stride=2),
        *(BottleneckSpec(256, kernel, 0, 4) for kernel in (5, 3, 5, 3)),
    ),
    (
        BottleneckSpec(640, 5, 5, 6, stride=2),
        *(BottleneckSpec(640, 5, 0, 4),) * 7,
        BottleneckSpec(640, 0, 0, 1),
        *_attention_stage(AttentionSpec(640, num_heads=12, head_dim=64, kv_stride=2), 14),
    ),
    (
        BottleneckSpec(1280, 5, 5, 6, stride=2),
        *_attention_stage(AttentionSpec(1280, num_heads=16, head_dim=96, kv_stride=1), 19),
    ),
)
"""The blocks of the full tower; their widths are multiplied by `channel_multiplier`."""


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower and its embedder; `soft_tokens` is the number of soft tokens for an image."""

    hidden_size: int
    text_hidden_size: int
    vocab_size: int
    rms_norm_eps: float
    soft_tokens: int
    channel_multiplier: float = 1.0

    def __post_init__(self) -> None:
        if self.soft_tokens != OUTPUT_SIDE**2:
            raise ConfigError(
                f"vision_soft_tokens_per_image is {self.soft_tokens}; {ARCHITECTURE} makes {OUTPUT_SIDE**2}."
            )
        if not 0.0 < self.channel_multiplier <= 1.0:
            raise ConfigError(f"channel_multiplier is {self.channel_multiplier}; it must be above 0 and at most 1.")

    def width(self, full_width: int) -> int:
        return _round_to_eight(full_width * self.channel_multiplier)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> VisionConfig:
        """Reads a full `config.json`.

        Raises:
            ConfigError: there is no vision tower, a key is missing, or a value is not implemented.
        """
        vision, text = config.get("vision_config"), config.get("text_config")
        if not isinstance(vision, Mapping) or not isinstance(text, Mapping):
            raise ConfigError("The config has no vision_config and text_config: it is not a full Gemma 3n config.")
        if (architecture := vision.get("architecture", ARCHITECTURE)) != ARCHITECTURE:
            raise ConfigError(f"The vision tower is {architecture!r}; only {ARCHITECTURE!r} is implemented.")
        if vision.get("do_pooling"):
            raise ConfigError("do_pooling of vision_config is set; only an unpooled feature map is implemented.")
        arguments = vision.get("model_args") or {}
        if not isinstance(arguments, Mapping) or arguments.keys() - {"channel_multiplier"}:
            raise ConfigError("model_args of vision_config has other keys than channel_multiplier, or is no object.")
        try:
            return cls(
                hidden_size=count(vision, "hidden_size"),
                text_hidden_size=count(text, "hidden_size"),
                vocab_size=count(vision, "vocab_size"),
                rms_norm_eps=number(vision, "rms_norm_eps", 0, 1, 1e-6),
                soft_tokens=count(config, "vision_soft_tokens_per_image"),
                channel_multiplier=number(arguments, "channel_multiplier", 1 / 64, 64, 1.0),
            )
        except KeyError as error:
            raise ConfigError(f"The Gemma 3n vision config has no {error.args[0]!r}.") from error
        except (TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"A value of the Gemma 3n vision config has the wrong type ({error}).") from error


def checkpoint_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the encoder in a checkpoint, by its name below `model.`."""
    with torch.device("meta"):
        encoder = VisionEncoder(config)
    pointwise = {f"{name}.weight" for name, module in encoder.named_modules() if isinstance(module, Pointwise)}
    return {
        name: (*parameter.shape, 1, 1) if name in pointwise else tuple(parameter.shape)
        for name, parameter in encoder.named_parameters()
    }


@dataclass(frozen=True)
class Grid:
    """The sizes of a feature map that is laid out as rows."""

    images: ops.Size
    height: ops.Size
    width: ops.Size


class Pointwise(Linear):
    """A 1x1 convolution of rows [T, in] -> [T, out]; in a checkpoint its weight is [out, in, 1, 1]."""


class Spatial(nn.Module):
    """A spatial convolution: rows [T, in] -> rows [T', out] and their grid."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.stride, self.groups = stride, groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, kernel, kernel))

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        channels_last = ops.reshape(x, grid.images, grid.height, grid.width, x.shape[1])
        convolved = ops.conv2d_same(
            channels_last.permute(0, 3, 1, 2), self.weight, stride=self.stride, groups=self.groups
        )
        return _rows(convolved, None if self.stride > 1 else grid)


def _depthwise(channels: int, kernel: int, stride: int) -> Spatial:
    return Spatial(channels, channels, kernel, stride, groups=channels)


def _rows(x: Tensor, grid: Grid | None = None) -> tuple[Tensor, Grid]:
    """x [n, C, h, w] -> rows [T, C] and their grid, taken from the shape unless `grid` is given."""
    channels_last = x.permute(0, 2, 3, 1)
    if grid is None:
        grid = Grid(*(ops.size_of_axis(channels_last, axis) for axis in range(3)))
    return ops.reshape(channels_last, -1, x.shape[1]), grid


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class ConvNorm(nn.Module):
    def __init__(self, conv: nn.Module, channels: int) -> None:
        super().__init__()
        self.conv = conv
        self.bn = RMSNorm(channels, NORM_EPS)


class LayerScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels))


class StemConv(Weight):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, 3, 3, 3)
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Grid]:
        """pixel_values [n, 3, h, w] -> rows [T, C] at half the height and width, and their grid."""
        return _rows(ops.conv2d_same(pixel_values, self.weight, self.bias, stride=2, groups=1))


class Stem(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = StemConv(channels)
        self.bn = RMSNorm(channels, NORM_EPS)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Grid]:
        x, grid = self.conv(pixel_values)
        return gelu(self.bn(x)), grid


class EdgeBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        expanded = _round_to_eight(in_channels * 4)
        self.skip = stride == 1 and in_channels == channels
        self.conv_exp = Spatial(in_channels, expanded, 3, stride)
        self.bn1 = RMSNorm(expanded, NORM_EPS)
        self.conv_pwl = Pointwise(expanded, channels)
        self.bn2 = RMSNorm(channels, NORM_EPS)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        expanded, grid = self.conv_exp(x, grid)
        y = self.bn2(self.conv_pwl(gelu(self.bn1(expanded))))
        return (y + x if self.skip else y), grid


class BottleneckBlock(nn.Module):
    """`scaled=False`, `skip=False`: without layer scale and skip connection, as in the fusion."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        expansion: int,
        start_kernel: int = 0,
        middle_kernel: int = 0,
        stride: int = 1,
        scaled: bool = True,
        skip: bool = True,
    ) -> None:
        super().__init__()
        expanded = _round_to_eight(in_channels * expansion)
        self.skip = skip and stride == 1 and in_channels == channels
        self.dw_start = self.dw_mid = self.layer_scale = None
        if start_kernel:
            start_stride = 1 if middle_kernel else stride
            self.dw_start = ConvNorm(_depthwise(in_channels, start_kernel, start_stride), in_channels)
        self.pw_exp = ConvNorm(Pointwise(in_channels, expanded), expanded)
        if middle_kernel:
            self.dw_mid = ConvNorm(_depthwise(expanded, middle_kernel, stride), expanded)
        self.pw_proj = ConvNorm(Pointwise(expanded, channels), channels)
        if scaled:
            self.layer_scale = LayerScale(channels)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        y = x
        if self.dw_start is not None:
            y, grid = self.dw_start.conv(y, grid)
            y = self.dw_start.bn(y)
        y = gelu(self.pw_exp.bn(self.pw_exp.conv(y)))
        if self.dw_mid is not None:
            y, grid = self.dw_mid.conv(y, grid)
            y = gelu(self.dw_mid.bn(y))
        y = self.pw_proj.bn(self.pw_proj.conv(y), None if self.layer_scale is None else self.layer_scale.gamma)
        return (y + x if self.skip else y), grid


class Projection(nn.Module):
    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.proj = Pointwise(in_channels, channels)


class KeyOrValue(nn.Module):
    """rows [T, C] -> [n, K, D], the grid downsampled by `stride`."""

    def __init__(self, channels: int, head_dim: int, stride: int) -> None:
        super().__init__()
        self.down_conv = None
        if stride > 1:
            self.down_conv = _depthwise(channels, 3, stride)
            self.norm = RMSNorm(channels, NORM_EPS)
        self.proj = Pointwise(channels, head_dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        if self.down_conv is not None:
            x, grid = self.down_conv(x, grid)
            x = self.norm(x)
        x = self.proj(x)
        return ops.reshape(x, grid.images, -1, x.shape[1])


class MultiQueryAttention(nn.Module):
    def __init__(self, channels: int, num_heads: int, head_dim: int, kv_stride: int) -> None:
        super().__init__()
        self.head_dim, self.width = head_dim, num_heads * head_dim
        self.query = Projection(channels, self.width)
        self.key = KeyOrValue(channels, head_dim, kv_stride)
        self.value = KeyOrValue(channels, head_dim, kv_stride)
        self.output = Projection(self.width, channels)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """rows [T, C] -> [T, C]. There is a single key head, so the heads of a position become further query rows."""
        query = ops.reshape(self.query.proj(x), grid.images, -1, self.head_dim)  # [n, h * w * N, D]
        attended = ops.attend_to_all(query, self.key(x, grid), self.value(x, grid))
        return self.output.proj(ops.reshape(attended, -1, self.width))


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, num_heads: int, head_dim: int, kv_stride: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, NORM_EPS)
        self.attn = MultiQueryAttention(channels, num_heads, head_dim, kv_stride)
        self.layer_scale = LayerScale(channels)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        return x + self.attn(self.norm(x), grid) * self.layer_scale.gamma, grid


class Fusion(nn.Module):
    """Fuses the feature maps of two stages, the second at half the resolution, into one of `OUTPUT_SIDE` squared."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.ffn = BottleneckBlock(in_channels, channels, expansion=2, scaled=False, skip=False)
        self.norm = RMSNorm(channels, NORM_EPS)

    def forward(self, fine: Tensor, coarse: Tensor, fine_grid: Grid, coarse_grid: Grid) -> Tensor:
        """rows [T, C1] and [T / 4, C2] -> [n * OUTPUT_SIDE**2, hidden]."""
        fused, grid = self.ffn(torch.cat((fine, _double(coarse, coarse_grid)), dim=1), fine_grid)
        return self.norm(_average(fused, grid))


def _double(x: Tensor, grid: Grid) -> Tensor:
    """Nearest-neighbour upsampling by 2: rows [T, C] -> [4 * T, C]."""
    channels = x.shape[1]
    columns = ops.reshape(torch.cat((x, x), dim=1), -1, grid.width, 2 * channels)
    return ops.reshape(torch.cat((columns, columns), dim=1), -1, channels)


def _average(x: Tensor, grid: Grid) -> Tensor:
    """Average pooling to `OUTPUT_SIDE` squared: rows [T, C] -> [n * OUTPUT_SIDE**2, C]."""
    channels = x.shape[1]
    height, width = (ops.floor_divide(size, OUTPUT_SIDE) for size in (grid.height, grid.width))
    rectangles = ops.reshape(x, grid.images, OUTPUT_SIDE, height, OUTPUT_SIDE, width, channels)
    return ops.reshape(rectangles.mean(2).mean(3), -1, channels)


class Tower(nn.Module):
    """pixel_values [n, 3, h, w] -> rows [n * OUTPUT_SIDE**2, hidden]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        channels = STEM_WIDTH
        self.conv_stem = Stem(channels)
        stages, widths = [], []
        for stage in STAGES:
            blocks = []
            for block in stage:
                blocks.append(_build(block, channels, config))
                channels = config.width(block.width)
            stages.append(nn.ModuleList(blocks))
            widths.append(channels)
        self.blocks: Sequence[Sequence[nn.Module]] = nn.ModuleList(stages)  # type: ignore[assignment]
        self.msfa = Fusion(sum(widths[i] for i in FUSED_STAGES), config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        maps = list(self._maps(pixel_values))
        fine, coarse = (maps[i] for i in FUSED_STAGES)
        return self.msfa(fine[0], coarse[0], fine[1], coarse[1])

    def _maps(self, pixel_values: Tensor) -> Iterator[tuple[Tensor, Grid]]:
        """The feature map of each stage."""
        x, grid = self.conv_stem(pixel_values)
        for stage in self.blocks:
            for block in stage:
                x, grid = repeated(block.forward, x, grid)
            yield x, grid


def _build(block: BlockSpec, in_channels: int, config: VisionConfig) -> nn.Module:
    channels = config.width(block.width)
    match block:
        case EdgeSpec():
            return EdgeBlock(in_channels, channels, block.stride)
        case BottleneckSpec():
            kernels = block.start_kernel, block.middle_kernel
            return BottleneckBlock(in_channels, channels, block.expansion, *kernels, block.stride)
        case AttentionSpec():
            return AttentionBlock(channels, block.num_heads, block.head_dim, block.kv_stride)


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.timm_model = Tower(config)


class VisionEncoder(nn.Module):
    """pixel_values [n, 3, h, w] fp32 in [0, 1] -> image_features [n * 256, text_hidden].

    Height and width must be multiples of 256, or up to 15 pixels less. For other sizes, timm resizes its last feature
    map; this is not implemented, so the graph fails.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.scale = math.sqrt(config.hidden_size)
        self.vision_tower = VisionTower(config)
        self.embed_vision = MultimodalEmbedder(
            config.vocab_size, config.hidden_size, config.text_hidden_size, config.rms_norm_eps
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.embed_vision.soft(self.vision_tower.timm_model(pixel_values) * self.scale)


def _round_to_eight(channels: float) -> int:
    """The nearest multiple of 8, or the next one if rounding loses more than 10 % (`make_divisible` of MobileNet)."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest
