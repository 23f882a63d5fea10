"""RMS norm per head with a SiLU gate, before it or after it, in chunks of tokens that stay in a processor's cache.

Letters: B batch, T tokens, H heads, V width of a head.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Order = Literal["gate_first", "norm_first"]
CHUNK_NUMBERS = 1 << 17  # numbers of a chunk


def gated_norm(y_BTHV: Tensor, gate_BTHV: Tensor, weight_HV: Tensor, eps: float, order: Order) -> Tensor:
    """norm(y silu(gate)) weight (`gate_first`: Mamba-2, 2405.21060) or norm(y) weight silu(gate) (`norm_first`).

    `weight_HV`: `[H, V]` or `[V]`. All of one dtype, at least fp32; the result is contiguous.
    """
    out: Tensor = _GatedNorm.apply(y_BTHV, gate_BTHV, weight_HV, eps, order == "gate_first")
    return out


def _chunks(y_BTHV: Tensor) -> list[slice]:
    tokens = y_BTHV.shape[1]
    step = max(16, CHUNK_NUMBERS * tokens // max(1, y_BTHV.numel()))
    return [slice(t, t + step) for t in range(0, tokens, step)]


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, weight: Tensor, eps: float, gate_first: bool) -> Tensor:
        out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        scale = y.new_empty(*y.shape[:3], 1)  # one over the root mean square
        for at in _chunks(y):
            silu = torch.nn.functional.silu(gate[:, at])
            normed = silu * y[:, at] if gate_first else y[:, at]
            mean = torch.mul(normed, normed, out=out[:, at]).mean(-1, keepdim=True)
            torch.rsqrt(mean.add_(eps), out=scale[:, at])
            torch.mul(normed, scale[:, at], out=out[:, at]).mul_(weight)
            if not gate_first:
                out[:, at] *= silu
        ctx.save_for_backward(y, gate, weight, scale)
        ctx.gate_first = gate_first
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, gate, weight, scale = ctx.saved_tensors
        d_y, d_gate = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (y, gate))
        d_weight = weight.new_zeros(y.shape[2:])
        buffers = [torch.empty_like(d_y[:, at]) for at in _chunks(y)[:1] for _ in range(3)]
        for at in _chunks(y):
            d_out, r, value = grad[:, at], scale[:, at], y[:, at]
            slope, silu, normed = (x[:, : d_out.shape[1]] for x in buffers)
            torch.sigmoid(gate[:, at], out=slope)
            torch.mul(slope, gate[:, at], out=silu)
            slope.addcmul_(slope, silu, value=-1).add_(silu)  # of the SiLU: sigmoid + silu (1 - sigmoid)
            if ctx.gate_first:
                torch.mul(value, silu, out=normed).mul_(r)
            else:
                torch.mul(value, r, out=normed)
            arriving = d_out if ctx.gate_first else torch.mul(d_out, silu, out=d_y[:, at])
            d_weight += torch.mul(arriving, normed, out=d_gate[:, at]).sum((0, 1))
            d_normed = torch.mul(arriving, weight, out=d_y[:, at])
            mean = torch.mul(d_normed, normed, out=d_gate[:, at]).mean(-1, keepdim=True)
            d_value = d_normed.addcmul_(normed, mean, value=-1).mul_(r)
            if ctx.gate_first:
                torch.mul(d_value, value, out=d_gate[:, at]).mul_(slope)
                d_value.mul_(silu)
            else:
                torch.mul(d_out, normed, out=d_gate[:, at]).mul_(weight).mul_(slope)
        return d_y, d_gate, d_weight if weight.dim() == 2 else d_weight.sum(0), None, None
