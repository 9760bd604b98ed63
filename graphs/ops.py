"""Torch operations that become one ONNX node each.

Outside an export each one runs in eager torch, so that modules can be tested and trained. A symbolic node cannot run
eagerly, hence the two branches.

Modules are traced with fixed sizes, several times faster than with symbolic ones. A shape that depends on a dynamic
size must therefore go through `reshape`, `count_to` and the like, never through a torch view; `export.trace` checks
that no traced size remains in a graph.

Shape legend: B batch, S new tokens, T = B * S, C cache capacity, N query heads, K KV heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.onnx.ops import symbolic, symbolic_multi_out

_OPSET = 23

Attributes = dict[str, Any]


def tracing() -> bool:
    return torch.compiler.is_exporting()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """`scale * x @ weight.T + bias` (Gemm, transB) for x [T, in], weight [out, in] as in the checkpoint, bias [out]."""
    if not tracing():
        product = F.linear(x, weight) * scale if scale != 1.0 else F.linear(x, weight)
        return product if bias is None else product + bias
    attributes: Attributes = {"transB": 1} if scale == 1.0 else {"transB": 1, "alpha": scale}
    inputs = (x, weight) if bias is None else (x, weight, bias)
    return symbolic("Gemm", inputs, attributes, dtype=x.dtype, shape=(x.shape[0], weight.shape[0]), version=_OPSET)


def add(*terms: Tensor) -> Tensor:
    """The sum of tensors of one shape."""
    if not tracing():
        return sum(terms[1:], terms[0])
    return symbolic("Sum", terms, dtype=terms[0].dtype, shape=terms[0].shape, version=_OPSET)


def split(x: Tensor, parts: int) -> Sequence[Tensor]:
    """x [T, parts * n] -> `parts` tensors [T, n]."""
    if not tracing():
        return x.chunk(parts, dim=1)
    shape = (x.shape[0], x.shape[1] // parts)
    attributes: Attributes = {"axis": 1, "num_outputs": parts}
    return symbolic_multi_out(
        "Split", (x,), attributes, dtypes=(x.dtype,) * parts, shapes=(shape,) * parts, version=_OPSET
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, computed in fp32; multiplies by `weight`, not by 1 + `weight`."""
    if not tracing():
        return _RMSNorm.apply(x.float(), weight.float(), eps).type_as(x)
    attributes: Attributes = {"axis": -1, "epsilon": eps}
    return symbolic("RMSNormalization", (x, weight), attributes, dtype=x.dtype, shape=x.shape, version=_OPSET)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm with an explicit gradient, twice as fast as autograd's."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps)
        normed = x * scale
        context.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        normed, scale, weight = context.saved_tensors
        product = gradient * normed
        along = (product @ weight).unsqueeze(-1) / normed.shape[-1]
        gradient_of_x = torch.addcmul(gradient * weight, normed, along, value=-1).mul_(scale)
        return gradient_of_x, product.flatten(0, -2).sum(0), None


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x))."""
    if not tracing():
        return F.softplus(x)
    return symbolic("Softplus", (x,), dtype=x.dtype, shape=x.shape, version=_OPSET)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """RoPE over the whole head, half-split (not interleaved). x [B, S, heads * D]; cos, sin [B, S, D / 2]."""
    if tracing():
        attributes: Attributes = {"num_heads": num_heads, "interleaved": 0}
        return symbolic("RotaryEmbedding", (x, cos, sin), attributes, dtype=x.dtype, shape=x.shape, version=_OPSET)
    low, high = x.unflatten(-1, (num_heads, -1)).chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).flatten(-2)


@dataclass(frozen=True)
class Size:
    """A dynamic size: its value while tracing, and the graph's tensor [1]."""

    number: int
    tensor: Tensor


def size_of_axis(x: Tensor, axis: int) -> Size:
    number = x.shape[axis]
    if not tracing():
        return Size(number, torch.tensor([number]))
    attributes: Attributes = {"start": axis, "end": axis + 1}
    tensor = symbolic("Shape", (x,), attributes, dtype=torch.int64, shape=(1,), version=_OPSET)
    return Size(number, tensor)


def reshape(x: Tensor, *sizes: int | Size) -> Tensor:
    """A view of x; one size may be -1."""
    numbers = [size.number if isinstance(size, Size) else size for size in sizes]
    if not tracing():
        return x.reshape(numbers)
    known = math.prod(number for number in numbers if number != -1)
    shape = [x.numel() // known if number == -1 else number for number in numbers]
    parts = [size.tensor if isinstance(size, Size) else torch.tensor([size]) for size in sizes]
    if not any(isinstance(size, Size) for size in sizes):
        parts = [torch.tensor(numbers)]
    wanted = torch.cat(parts) if len(parts) > 1 else parts[0]
    return symbolic("Reshape", (x, wanted), dtype=x.dtype, shape=shape, version=_OPSET)


def count_to(size: Size) -> Tensor:
    """0, 1, ... size - 1 as int64."""
    if not tracing():
        return torch.arange(size.number)
    bounds = (torch.tensor(0), size.tensor.squeeze(0), torch.tensor(1))
    return symbolic("Range", bounds, dtype=torch.int64, shape=(size.number,), version=_OPSET)


def ceil_divide(size: Size, by: int) -> Size:
    """`size / by`, rounded up."""
    return Size(-(-size.number // by), integer_divide(size.tensor + (by - 1), torch.tensor([by])))


def difference(a: int, b: Size) -> Size:
    """a - b. The number is at least 1 while tracing, where sizes are arbitrary."""
    number = a - b.number
    return Size(max(number, 1) if tracing() else number, a - b.tensor)


def expand(x: Tensor, *sizes: int | Size) -> Tensor:
    """x with its axes of length 1 repeated to `sizes`. A negative size is an error, also at run time."""
    numbers = [size.number if isinstance(size, Size) else size for size in sizes]
    if not tracing():
        return x + torch.zeros(numbers, dtype=x.dtype)
    wanted = torch.cat([size.tensor if isinstance(size, Size) else torch.tensor([size]) for size in sizes])
    return symbolic("Expand", (x, wanted), dtype=x.dtype, shape=numbers, version=_OPSET)


def fit(x: Tensor, axis: int, length: Size, before: int = 0) -> Tensor:
    """Pads `axis` of x with `before` zeros in front, then pads or cuts its end to `length`."""
    if not tracing():
        return F.pad(x, (0, 0) * (x.ndim - 1 - axis) + (before, length.number - before - x.shape[axis]))
    after = length.tensor - size_of_axis(x, axis).tensor - before
    shape = [*x.shape[:axis], length.number, *x.shape[axis + 1 :]]
    inputs = (x, torch.cat([torch.tensor([before]), after]), torch.tensor(0, dtype=x.dtype), torch.tensor([axis]))
    return symbolic("Pad", inputs, dtype=x.dtype, shape=shape, version=_OPSET)


def integer_divide(a: Tensor, b: Tensor) -> Tensor:
    """`a // b` for int64 a [B] >= 0 and b [1] > 0."""
    if not tracing():
        return a // b
    return symbolic("Div", (a, b), dtype=torch.int64, shape=a.shape, version=_OPSET)


def replace_rows(x: Tensor, chosen: Tensor, rows: Tensor) -> Tensor:
    """Replaces the first n chosen rows of x [T, H] by rows [n, H], in order; chosen [T] bool, n may be 0."""
    if not tracing():
        return x.index_copy(0, chosen.nonzero()[: len(rows), 0], rows)
    count = size_of_axis(rows, 0)
    places = symbolic("NonZero", (chosen,), dtype=torch.int64, shape=(1, x.shape[0]), version=_OPSET)
    bounds = (places, torch.tensor([0]), count.tensor, torch.tensor([1]))
    first = symbolic("Slice", bounds, dtype=torch.int64, shape=(1, count.number), version=_OPSET)
    indices = symbolic("Transpose", (first,), dtype=torch.int64, shape=(count.number, 1), version=_OPSET)
    return symbolic("ScatterND", (x, indices, rows), dtype=x.dtype, shape=x.shape, version=_OPSET)


def attend_and_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    last_position: Tensor,
    total_length: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    window: int | None,
    windowed_cache: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of a layer that produces K and V (GroupQueryAttention with scale 1; RoPE is applied before).

    Args:
        query: [B, S, N * D]. key, value: [B, S, K * D].
        past_key, past_value: [B, K, C, D]; the runtime binds the same buffers as outputs.
        last_position: int32 [B], tokens of each row after this step minus one.
        total_length: int32 [1], the largest token count of the batch after this step.
        window: number of positions to attend to, the current one included; None for all.
        windowed_cache: the cache keeps only the window's positions, in the operator's documented layout for
            `sliding_window_cache`.

    Returns:
        The output [B, S, N * D] and the present K and V [B, K, C, D].

    In eager mode the past is ignored: it takes whole right-padded sequences and returns present [B, K, S, D].
    """
    if not tracing():
        present_key, present_value = (x.unflatten(-1, (num_kv_heads, -1)).transpose(1, 2) for x in (key, value))
        output = attend_to_cache(
            query, present_key, present_value, last_position, total_length,
            num_heads=num_heads, num_kv_heads=num_kv_heads, window=window,
        )  # fmt: skip
        return output, present_key, present_value
    attributes: Attributes = {
        "num_heads": num_heads,
        "kv_num_heads": num_kv_heads,
        "scale": 1.0,
        "local_window_size": -1 if window is None else window,
    }
    if windowed_cache:
        attributes["sliding_window_cache"] = 1
    output, present_key, present_value = symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (query, key, value, past_key, past_value, last_position, total_length),
        attributes,
        dtypes=(query.dtype, past_key.dtype, past_value.dtype),
        shapes=(query.shape, past_key.shape, past_value.shape),
        version=1,
    )
    return output, present_key, present_value


def attend_to_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    last_position: Tensor,
    total_length: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    window: int | None,
    nothing: Tensor | None = None,
) -> Tensor:
    """Causal attention of a KV-shared layer to its donor's present K and V [B, K, C, D].

    The S rows of `query` [B, S, N * D] are the last S positions. `last_position` and `total_length` count the rows
    of the donor's cache, fewer than the tokens seen if it is windowed. `nothing` is an empty key and value
    [B, 0, K * D], which only a graph needs.
    """
    if tracing():
        assert nothing is not None
        attributes: Attributes = {
            "num_heads": num_heads,
            "kv_num_heads": num_kv_heads,
            "scale": 1.0,
            "local_window_size": -1 if window is None else window,
        }
        return symbolic(
            "com.microsoft::GroupQueryAttention",
            (query, nothing, nothing, key, value, last_position, total_length),
            attributes,
            dtype=query.dtype,
            shape=query.shape,
            version=1,
        )
    steps, length = query.shape[1], key.shape[2]
    if steps == length:
        own = torch.arange(length).expand(query.shape[0], -1)
    else:
        own = last_position[:, None].long() - steps + 1 + torch.arange(steps)
    distance = own[:, :, None] - torch.arange(length)
    visible = (distance >= 0) & (distance < (window or length))
    q = query.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    attended = F.scaled_dot_product_attention(q, key, value, visible[:, None], scale=1.0, enable_gqa=True)
    return attended.transpose(1, 2).flatten(2)


def no_rows(x: Tensor, width: int) -> Tensor:
    """x [B, S, n] -> [B, 0, width], for width <= n."""
    if not tracing():
        return x[:, :0, :width]
    starts, ends, axes = torch.tensor([0, 0]), torch.tensor([0, width]), torch.tensor([1, 2])
    return symbolic("Slice", (x, starts, ends, axes), dtype=x.dtype, shape=(x.shape[0], 0, width), version=_OPSET)


def conv2d_same(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int, groups: int) -> Tensor:
    """Convolution of x [n, C, h, w] with SAME_UPPER padding: the output has ceil(h / stride) rows."""
    size, kernel = x.shape[2:], weight.shape[2:]
    if not tracing():
        height, width = (max((-(-s // stride) - 1) * stride + k - s, 0) for s, k in zip(size, kernel))
        padding = (width // 2, width - width // 2, height // 2, height - height // 2)
        return F.conv2d(F.pad(x, padding), weight, bias, stride, groups=groups)
    attributes: Attributes = {
        "auto_pad": "SAME_UPPER",
        "group": groups,
        "kernel_shape": list(kernel),
        "strides": [stride, stride],
    }
    shape = (x.shape[0], weight.shape[0], *(-(-s // stride) for s in size))
    inputs = (x, weight) if bias is None else (x, weight, bias)
    return symbolic("Conv", inputs, attributes, dtype=x.dtype, shape=shape, version=_OPSET)


def attend_to_all(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for query [n, Q, D], key and value [n, K, D], for any Q and K."""
    if not tracing():
        return F.scaled_dot_product_attention(query, key, value)
    return symbolic(
        "com.microsoft::MultiHeadAttention",
        (query, key, value),
        {"num_heads": 1},
        dtype=query.dtype,
        shape=query.shape,
        version=1,
    )


def floor_divide(size: Size, by: int) -> Size:
    """`size / by`, rounded down."""
    return Size(size.number // by, integer_divide(size.tensor, torch.tensor([by])))
