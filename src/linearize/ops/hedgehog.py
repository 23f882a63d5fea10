"""Hedgehog features (2402.04347) whose backward pass keeps little else; the gain is ours (`mixers/feature_maps.py`).

phi(x) = exp(l) [softmax(x W), softmax(-x W)].

Letters: G groups of R heads, H = G R, C tokens, D head dimension, F columns of W; leading dimensions are free.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.ops.products import product

SMALLEST = 1e-12


def hedgehog(x: Tensor, weight_HDF: Tensor, log_gain: Tensor | None = None) -> Tensor:
    """Features of x, `[..., G, C, D] -> [..., H, C, 2 F]`, at least 1e-12; times exp(`log_gain: [..., H, C, 1]`)."""
    phi: Tensor = _Hedgehog.apply(x, weight_HDF.unflatten(0, (x.shape[-3], -1)), log_gain)
    return phi


def _rows(x: Tensor) -> Tensor:
    """`[..., G, C, D] -> [G, M, D]`, M all tokens."""
    return x.movedim(-3, 0).flatten(1, -2)


class _Hedgehog(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_GRDF: Tensor, log_gain: Tensor | None) -> Tensor:
        groups, heads, _, features = weight_GRDF.shape
        lead, tokens = x.shape[:-3], x.shape[-2]
        z = product(_rows(x), weight_GRDF.transpose(1, 2).flatten(2))
        z = z.view(groups, *lead, tokens, heads, features).movedim(0, -4).transpose(-2, -3)  # [..., G, R, C, F]
        signed = x.new_empty(*lead, groups, heads, tokens, 2, features)
        signed[..., 0, :] = z
        signed[..., 1, :] = z
        signed[..., 1, :].neg_()
        phi = signed.softmax(-1).clamp_(min=SMALLEST)
        gain = None if log_gain is None else log_gain.exp()
        if gain is not None:
            phi.mul_(gain.view(*phi.shape[:-2], 1, 1))
        ctx.save_for_backward(x, weight_GRDF, phi, gain)
        return phi.flatten(-2).flatten(-4, -3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, phi, gain = ctx.saved_tensors
        groups, heads, _, features = weight.shape
        d_signed = grads[0].reshape(phi.shape) * phi
        row = d_signed.sum(-1, keepdim=True)
        d_gain = None if gain is None else row.sum(-2).view(gain.shape)
        d_signed.addcmul_(phi, row if gain is None else row / gain.view(*phi.shape[:-2], 1, 1), value=-1)
        d_z = x.new_empty(groups, *x.shape[:-3], x.shape[-2], heads, features)
        view = d_z.movedim(0, -4).transpose(-2, -3)
        torch.sub(d_signed[..., 0, :], d_signed[..., 1, :], out=view)
        d_z = d_z.flatten(1, -3).flatten(-2)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_rows = product(d_z, weight.transpose(2, 3).flatten(1, 2))
            d_x = d_rows.unflatten(1, (*x.shape[:-3], x.shape[-2])).movedim(0, -3)
        d_weight = product(_rows(x).mT, d_z).unflatten(2, (heads, features)).transpose(1, 2)
        return d_x, d_weight, d_gain
