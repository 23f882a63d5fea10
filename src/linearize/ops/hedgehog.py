"""Hedgehog features (2402.04347) whose backward pass keeps little else; the gain is ours (`mixers/feature_maps.py`).

phi(x) = exp(l) [softmax(x W), softmax(-x W)].

Letters: G groups of R heads, H = G R, C tokens, D head dimension, F columns of W; leading dimensions are free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize.ops.blocking import HeadBlock, head_blocks, scratch
from linearize.ops.matmul import product_into

SMALLEST = 1e-12


def hedgehog(x: Tensor, weight_HDF: Tensor, log_gain: Tensor | None = None) -> Tensor:
    """Features of x, `[..., G, C, D] -> [..., H, C, 2 F]`, at least 1e-12; times exp(`log_gain: [..., H, C, 1]`)."""
    decoded = x.shape[-2] == 1 and not torch.is_grad_enabled()  # nothing to keep or to cut
    if decoded or torch.compiler.is_compiling():
        return _in_one(project(x, weight_HDF), log_gain)
    phi: Tensor = _Hedgehog.apply(x, weight_HDF.unflatten(0, (x.shape[-3], -1)), log_gain)
    return phi


def project(x: Tensor, weight_HDF: Tensor) -> Tensor:
    """x W for each query head, `[..., G, C, D] -> [..., H, C, F]`; keys of a group are not repeated."""
    if x.dim() == 4 and x.shape[2] == 1 and x.shape[1] == weight_HDF.shape[0]:  # a decoded token's queries
        return torch.bmm(x[:, :, 0].transpose(0, 1), weight_HDF).transpose(0, 1)[:, :, None]
    weight_GRDF = weight_HDF.unflatten(0, (x.shape[-3], -1))
    return torch.einsum("...gcd,grdf->...grcf", x, weight_GRDF).flatten(-4, -3)


def _in_one(z: Tensor, log_gain: Tensor | None) -> Tensor:
    """Features of x W in few operations, which a compiler fuses."""
    both = torch.cat([z, -z], dim=-1).unflatten(-1, (2, -1)).softmax(-1)
    phi = both.flatten(-2).clamp(min=SMALLEST)
    return phi if log_gain is None else phi * log_gain.exp()


@dataclass(frozen=True, eq=False)
class _Part:
    """Some heads of some rows: what of each tensor is theirs."""

    block: HeadBlock
    x: Tensor
    weight_gDX: Tensor
    per_group: int

    @property
    def rows(self) -> Tensor:
        """All tokens of a group, `[g, M, D]`."""
        return self.x.transpose(0, 1).flatten(1, 2)

    def like_phi(self, z_gMX: Tensor) -> Tensor:
        """`[g, M, R F]` as `[b, g, R, C, F]`."""
        batch, groups, tokens, _ = self.x.shape
        features = z_gMX.shape[2] // self.per_group
        return z_gMX.view(groups, batch, tokens, self.per_group, features).permute(1, 0, 3, 2, 4)


def _parts(x_BGCD: Tensor, weight_GRDF: Tensor) -> Iterator[_Part]:
    batch, groups, tokens, _ = x_BGCD.shape
    per_group, features = weight_GRDF.shape[1], weight_GRDF.shape[3]
    for block in head_blocks(batch, groups, 2 * tokens * per_group * features):
        weight = weight_GRDF[block.groups].transpose(1, 2).flatten(2)
        yield _Part(block, block.of(x_BGCD), weight, per_group)


class _Hedgehog(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_GRDF: Tensor, log_gain: Tensor | None) -> Tensor:
        groups, heads, _, features = weight_GRDF.shape
        lead, tokens, memory = x.shape[:-3], x.shape[-2], scratch()
        x_BGCD = x.reshape(math.prod(lead), *x.shape[-3:])
        phi = x.new_empty(x_BGCD.shape[0], groups, heads, tokens, 2, features)
        gain = None if log_gain is None else log_gain.exp()
        for part in _parts(x_BGCD, weight_GRDF):
            rows, own = part.rows, part.block.of(phi)
            z = memory("z", *rows.shape[:2], heads * features, like=x)
            z = part.like_phi(product_into(z, rows, part.weight_gDX))
            signed = memory("signed", *own.shape, like=x)
            signed[..., 0, :] = z
            torch.neg(z, out=signed[..., 1, :])
            torch.softmax(signed, -1, out=own)
            own.clamp_(min=SMALLEST)
            if gain is not None:
                own.mul_(part.block.of(gain.view(*phi.shape[:4], 1, 1)))
        ctx.save_for_backward(x, weight_GRDF, phi, gain)
        return phi.view(*lead, groups * heads, tokens, 2 * features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, phi, gain = ctx.saved_tensors
        groups, heads, _, features = weight.shape
        memory, d_phi = scratch(), grads[0].reshape(phi.shape)
        x_BGCD = x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
        d_x = torch.empty_like(x_BGCD, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        d_weight = weight.new_zeros(groups, weight.shape[2], heads * features)
        d_gain = None if gain is None else gain.new_empty(phi.shape[:4])
        for part in _parts(x_BGCD, weight):
            own, block = part.block.of(phi), part.block
            d_signed = torch.mul(block.of(d_phi), own, out=memory("signed", *own.shape, like=x))
            row = d_signed.sum(-1, keepdim=True)
            if gain is not None and d_gain is not None:
                torch.sum(row, (-2, -1), out=block.of(d_gain))
                row = row / block.of(gain.view(*phi.shape[:4], 1, 1))
            d_signed.addcmul_(own, row, value=-1)
            rows = part.rows
            d_z = memory("z", *rows.shape[:2], heads * features, like=x)
            torch.sub(d_signed[..., 0, :], d_signed[..., 1, :], out=part.like_phi(d_z))
            if d_x is not None:
                d_rows = memory("rows", *rows.shape, like=x)
                product_into(d_rows, d_z, part.weight_gDX.mT)
                block.of(d_x).copy_(d_rows.unflatten(1, (-1, x.shape[-2])).transpose(0, 1))
            product_into(d_weight[block.groups], rows.mT, d_z, beta=1)
        d_weight = d_weight.unflatten(2, (heads, features)).transpose(1, 2)
        return None if d_x is None else d_x.view(x.shape), d_weight, None if d_gain is None else d_gain.view(gain.shape)
