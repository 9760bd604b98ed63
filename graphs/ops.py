"""Torch operations that become one ONNX node each.

Outside an export they compute the same in plain torch, so that a module written with them can be
tested and trained. A symbolic node has no eager meaning, hence the two branches.

Shape legend: B batch, S new tokens, T = B * S, C cache capacity, N query heads, K KV heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.onnx.ops import symbolic, symbolic_multi_out

_OPSET = 23

Attributes = dict[str, Any]


def tracing() -> bool:
    return torch.compiler.is_exporting()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` for x [T, in] and weight [out, in]: the checkpoint's layout is kept (Gemm, transB)."""
    if not tracing():
        return F.linear(x, weight)
    shape = (x.shape[0], weight.shape[0])
    return symbolic("Gemm", (x, weight), {"transB": 1}, dtype=x.dtype, shape=shape, version=_OPSET)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, computed in fp32; multiplies by `weight`, not by 1 + `weight`."""
    if not tracing():
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        return (normed * weight.float()).type_as(x)
    attributes: Attributes = {"axis": -1, "epsilon": eps}
    return symbolic("RMSNormalization", (x, weight), attributes, dtype=x.dtype, shape=x.shape, version=_OPSET)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """RoPE in the half-split form over the whole head. x [B, S, heads * D]; cos, sin [B, S, D / 2]."""
    if tracing():
        attributes: Attributes = {"num_heads": num_heads, "interleaved": 0}
        return symbolic("RotaryEmbedding", (x, cos, sin), attributes, dtype=x.dtype, shape=x.shape, version=_OPSET)
    low, high = x.unflatten(-1, (num_heads, -1)).chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).flatten(-2)


def length_of_axis(x: Tensor, axis: int) -> Tensor:
    """The size of one axis as an int64 tensor [1], so that index arithmetic stays in the graph."""
    if tracing():
        attributes: Attributes = {"start": axis, "end": axis + 1}
        return symbolic("Shape", (x,), attributes, dtype=torch.int64, shape=(1,), version=_OPSET)
    return torch.tensor([x.shape[axis]], dtype=torch.int64)


def integer_divide(a: Tensor, b: Tensor) -> Tensor:
    """`a // b` for int64 a [B] >= 0 and b [1] > 0."""
    if not tracing():
        return a // b
    return symbolic("Div", (a, b), dtype=torch.int64, shape=a.shape, version=_OPSET)


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
    """Causal attention of a layer that produces K and V (GroupQueryAttention, scale 1, no rotation inside).

    Args:
        query: [B, S, N * D]. key, value: [B, S, K * D].
        past_key, past_value: [B, K, C, D]; the runtime binds the same buffers as outputs.
        last_position: int32 [B], tokens of each row after this step minus one.
        total_length: int32 [1], the largest token count of the batch after this step.
        window: attend to this many positions, the own one included; None for all.
        windowed_cache: the cache keeps the window's positions only; its layout is the one that the
            operator's documentation of `sliding_window_cache` gives.

    Returns:
        The output [B, S, N * D] and the present K and V [B, K, C, D].

    Without an export the past is ignored: whole right-padded sequences only, present [B, K, S, D].
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
) -> Tensor:
    """Causal attention of a KV-shared layer to its donor's present K and V [B, K, C, D].

    The S rows of `query` [B, S, N * D] are the last S positions. `last_position` and `total_length`
    count the rows that the donor's cache holds, which is less than the tokens seen if it is windowed.
    """
    if tracing():
        batch = query.shape[0]
        nothing = query.new_empty((batch, 0, key.shape[1] * key.shape[3]))
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
        own = torch.arange(length)[None, :].expand(query.shape[0], -1)
    else:
        own = last_position[:, None].long() - steps + 1 + torch.arange(steps)
    distance = own[:, :, None] - torch.arange(length)
    visible = (distance >= 0) & (distance < (window or length))
    q = query.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    k, v = (x.repeat_interleave(num_heads // num_kv_heads, dim=1) for x in (key, value))
    scores = (q @ k.transpose(2, 3)).float().masked_fill(~visible[:, None], torch.finfo(torch.float32).min)
    return (scores.softmax(-1).type_as(v) @ v).transpose(1, 2).flatten(2)
