"""Parts that recurrent mixers share: head repeats, gated norms, the starts of step sizes and decays, rotary positions.

Letters: B batch, T tokens, H query heads, G key/value heads, X any width of a head, D head dimension, V value
dimension, C channels, K taps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.errors import InputError
from linearize.mixers.layer_mixer import copy_rows
from linearize.ops.conv_heads import can_fuse
from linearize.ops.gated_norm import gated_norm
from linearize.ops.layout import Layout

if TYPE_CHECKING:
    from linearize.mixers.base import AttentionShape
    from linearize.ops.triton.fused_heads import HeadSizes

Repeat = Literal["before", "after"]
MAX_UNFUSED_TOKENS = 8  # up to which nothing is gained by working in chunks


def wide(x: Tensor) -> Tensor:
    """x in at least fp32: gates, norms and states are computed there."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def repeat_heads(x_BTC: Tensor, groups: int, heads: int) -> Tensor:
    """Channels of key/value heads repeated for their query heads, `[B, T, G X] -> [B, T, H X]`."""
    if groups == heads:
        return x_BTC
    return x_BTC.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, dim=-2).flatten(-2)


def split_heads(x_BTC: Tensor, heads: int) -> Tensor:
    """`[B, T, heads X] -> [B, heads, T, X]`."""
    return x_BTC.unflatten(-1, (heads, -1)).transpose(1, 2)


def head_sizes(shape: AttentionShape, repeat: Repeat) -> HeadSizes:
    """The sizes of a layer with a matrix for each head, as its kernel takes them."""
    from linearize.ops.triton.fused_heads import HeadSizes

    return HeadSizes(
        heads=shape.num_heads,
        groups=shape.num_kv_heads,
        key_dim=shape.head_dim,
        value_dim=shape.value_dim,
        repeat=repeat,
    )


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x over its root mean square along the last dimension, at least fp32."""
    x = wide(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x over its length along the last dimension, at least fp32 (Gated DeltaNet, 2412.06464; eps inside the root)."""
    x = wide(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def gate_then_norm(y_BTHV: Tensor, gate_BTHV: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm per head of y silu(gate), times `weight: [H, V]` or `[V]` (Mamba-2, 2405.21060, section 7.1)."""
    if _fused(y_BTHV, gate_BTHV):
        return gated_norm(y_BTHV, gate_BTHV, weight, eps, "gate_first")
    return rms_norm(wide(y_BTHV) * F.silu(wide(gate_BTHV)), eps) * weight


def norm_then_gate(y_BTHV: Tensor, gate_BTHV: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm per head of y, times `weight: [H, V]` or `[V]`, times silu(gate) (Gated DeltaNet, 2412.06464)."""
    if _fused(y_BTHV, gate_BTHV):
        return gated_norm(y_BTHV, gate_BTHV, weight, eps, "norm_first")
    return rms_norm(y_BTHV, eps) * weight * F.silu(wide(gate_BTHV))


def _fused(y_BTHV: Tensor, gate_BTHV: Tensor) -> bool:
    many = y_BTHV.dim() == 4 and y_BTHV.shape[1] > MAX_UNFUSED_TOKENS
    return many and can_fuse(gate_BTHV) and y_BTHV.dtype == gate_BTHV.dtype


def start_step_bias(bias: Tensor, *, dt_min: float, dt_max: float, floor: float = 1e-4) -> None:
    """Fill `dt_bias` so that softplus of it is log-uniform in [dt_min, dt_max] (Mamba, 2312.00752, section 3.6)."""
    with torch.no_grad():
        low, high = math.log(dt_min), math.log(dt_max)
        dt = torch.empty_like(bias).uniform_(low, high).exp().clamp(min=floor)
        bias.copy_(inverse_softplus(dt))


def inverse_softplus(y: Tensor) -> Tensor:
    """x with log(1 + e^x) = y > 0."""
    return y + torch.log(-torch.expm1(-y))


def start_decay(log_A: Tensor, *, lowest: float = 1.0, highest: float = 16.0) -> None:
    """Fill `A_log` so that A = -exp(A_log) is uniform in -[lowest, highest] (Mamba-2's published start)."""
    with torch.no_grad():
        log_A.copy_(torch.empty_like(log_A).uniform_(lowest, highest).log())


def start_conv(weight_CK: Tensor, bias_C: Tensor | None = None) -> None:
    """torch's start of a depthwise Conv1d: uniform in +-1 / sqrt(taps), the bias too (as published)."""
    with torch.no_grad():
        bound = weight_CK.shape[1] ** -0.5
        for parameter in (weight_CK, bias_C):
            if parameter is not None:
                parameter.uniform_(-bound, bound)


def copy_projection(linear: nn.Linear, *parts: tuple[int, Tensor, Tensor | None]) -> None:
    """Copy the teacher's rows into a projection: the row each part starts at, its weight, its bias (None: none).

    A projection that has a bias starts it at 0 where the teacher has none.

    Raises:
        InputError: a bias of the teacher that the projection has no place for.
    """
    copy_rows(linear.weight, *((start, weight) for start, weight, _ in parts))
    if linear.bias is None:
        if any(bias is not None and bool(bias.any()) for *_, bias in parts):
            raise InputError(
                "the teacher's projections have biases and the mixer was built without: set qkv_bias and output_bias "
                "of its AttentionShape"
            )
        return
    with torch.no_grad():
        linear.bias.zero_()
    copy_rows(linear.bias, *((start, bias) for start, _, bias in parts))


def rotate(x_BHTD: Tensor, layout: Layout, theta: float) -> Tensor:
    """Rotary positions (2104.09864) in halves, as Llama's: dimensions d and d + D / 2 turn by position theta^(-2 d/D).

    With an odd D the last dimension is left as it is. Padding gets position 0.
    """
    tokens, half = x_BHTD.shape[2], x_BHTD.shape[3] // 2
    position = layout.positions(tokens, x_BHTD.device).clamp(min=0)
    frequency = theta ** (-torch.arange(half, dtype=torch.float64, device=x_BHTD.device) * 2 / x_BHTD.shape[3])
    angle = (position[:, None, :, None].double() * frequency).to(torch.promote_types(x_BHTD.dtype, torch.float32))
    cos, sin = angle.cos().to(x_BHTD.dtype), angle.sin().to(x_BHTD.dtype)
    a, b, rest = x_BHTD[..., :half], x_BHTD[..., half : 2 * half], x_BHTD[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
