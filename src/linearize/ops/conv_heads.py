"""Short convolution, SiLU and heads in one pass: what a recurrent layer does between its projection and its recurrence.

Computes what `short_conv`, `silu`, a repeat of key/value heads and an L2 norm compute one after the other, in chunks of
tokens that stay in a processor's cache, and computes them again in the backward pass: what it keeps is its input.

Letters: B batch, T tokens, R columns of the projection, G key/value heads, H = G J query heads, D width of a head,
C channels of the convolution (H D of each part), K taps, N tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from linearize.ops.layout import Layout

CHUNK_NUMBERS = 1 << 17  # numbers of a chunk
EPS = 1e-6  # of the L2 norm, under the root


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Columns of the projection that become heads.

    `first`: the first column. `groups` heads of `dim` are there, and `heads` come out: each is repeated for its query
    heads before the convolution. `length`: the length that each head's vector is brought to (None: it is left).
    """

    first: int
    groups: int
    heads: int
    dim: int
    length: float | None = None


def can_fuse(x_BTR: Tensor) -> bool:
    """Whether fused passes are the better way: on a processor, in full precision."""
    return x_BTR.device.type == "cpu" and x_BTR.dtype in (torch.float32, torch.float64)


def can_convolve(x_BTR: Tensor, layout: Layout) -> bool:
    """Whether `conv_heads` computes this call, and well: no dead tokens between others."""
    return can_fuse(x_BTR) and not layout.gaps()


def conv_heads(
    x_BTR: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    parts: Sequence[Heads],
    *,
    passed: Sequence[tuple[int, int]] = (),
    layout: Layout,
) -> tuple[Tensor, ...]:
    """`[B, T, last - first]` for each range of columns in `passed`, as they are, then `[B, T, H, D]` for each part.

    `weight_CK`, `bias_C`: channels in the order of the parts, as `short_conv` takes them. Every column belongs to one
    part or one range. Padding and documents as in `short_conv`; no inputs before these tokens.
    """
    taps = weight_CK.shape[1]
    same = tuple(_same(layout, lag, x_BTR) for lag in range(taps))
    outputs: tuple[Tensor, ...] = _ConvHeads.apply(x_BTR, weight_CK, bias_C, tuple(parts), tuple(passed), same)
    return outputs


def _same(layout: Layout, lag: int, x_BTR: Tensor) -> Tensor | None:
    """1 where the token `lag` before is alive and of the same document, else 0: `[B or 1, T, 1, 1, 1]` (None:
    everywhere)."""
    starts = layout.starts(x_BTR.shape[1], x_BTR.device)
    if starts is None or lag == 0:
        return None
    document = starts.long().cumsum(-1)
    seen = document[:, lag:] == document[:, :-lag]
    if (live_BT := layout.live()) is not None:
        seen = seen & live_BT[:, :-lag]
    same = F.pad(seen, (min(lag, document.shape[1]), 0))
    return same[..., None, None, None].to(x_BTR.dtype)


class _ConvHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTR: Tensor,
        weight_CK: Tensor,
        bias_C: Tensor | None,
        parts: tuple[Heads, ...],
        passed: tuple[tuple[int, int], ...],
        same: tuple[Tensor | None, ...],
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_BTR, weight_CK, bias_C)
        ctx.parts, ctx.passed, ctx.same = parts, passed, same
        outputs = [x_BTR[..., first:last] for first, last in passed]
        for part in _parts(x_BTR, weight_CK, bias_C, parts, same):
            outputs.append(part.forward())
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        d_x, d_weight = torch.empty_like(x), torch.zeros_like(weight)
        d_bias = None if bias is None else torch.zeros_like(bias)
        for (first, last), grad in zip(ctx.passed, grads, strict=False):
            d_x[..., first:last] = grad
        for part, grad in zip(_parts(x, weight, bias, ctx.parts, ctx.same), grads[len(ctx.passed) :], strict=True):
            part.backward(grad, d_x, d_weight, d_bias)
        return d_x, d_weight, d_bias, None, None, None


def _parts(
    x_BTR: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    parts: tuple[Heads, ...],
    same: tuple[Tensor | None, ...],
) -> list[_Part]:
    made, channel = [], 0
    for heads in parts:
        last = channel + heads.heads * heads.dim
        made.append(_Part(heads, x_BTR, weight_CK, bias_C, slice(channel, last), same))
        channel = last
    return made


class _Part:
    """One part of a call. Inside, its tensors are `[B, N, G, J, D]` and x is `[B, T, G, 1, D]`."""

    def __init__(
        self,
        heads: Heads,
        x_BTR: Tensor,
        weight_CK: Tensor,
        bias_C: Tensor | None,
        channels: slice,
        same: tuple[Tensor | None, ...],
    ) -> None:
        self.heads, self.channels, self.same = heads, channels, same
        shape = (heads.groups, -1, heads.dim)
        self.x = self._columns(x_BTR)
        self.taps = weight_CK[channels].mT.contiguous().flip(0).unflatten(1, shape)  # by lag
        self.bias = None if bias_C is None else bias_C[channels].unflatten(0, shape)
        batch, self.tokens = x_BTR.shape[:2]
        self.chunk = min(self.tokens, max(16, CHUNK_NUMBERS // max(1, batch * heads.heads * heads.dim)))

    def _columns(self, x_BTR: Tensor) -> Tensor:
        heads = self.heads
        columns = x_BTR[..., heads.first : heads.first + heads.groups * heads.dim]
        return columns.unflatten(-1, (heads.groups, 1, heads.dim))

    def _empty(self, tokens: int) -> Tensor:
        return self.x.new_empty(self.x.shape[0], tokens, *self.taps.shape[1:])

    def _convolve(self, t: int, out: Tensor) -> Tensor:
        """What the SiLU takes, of the tokens `t ...` that `out` has room for."""
        size = out.shape[1]
        torch.mul(self.x[:, t : t + size], self.taps[0], out=out)
        if self.bias is not None:
            out += self.bias
        for lag in range(1, len(self.taps)):
            if (skip := max(0, lag - t)) < size:
                out[:, skip:].addcmul_(self._seen(t + skip, t + size, lag), self.taps[lag])
        return out

    def _seen(self, first: int, last: int, lag: int) -> Tensor:
        """x `lag` tokens before the tokens `first ... last`, 0 where that is of another document."""
        seen, same = self.x[:, first - lag : last - lag], self.same[lag]
        return seen if same is None else seen * same[:, first:last]

    def forward(self) -> Tensor:
        """`[B, T, H, D]`."""
        y, scratch, heads = self._empty(self.tokens), self._empty(self.chunk), self.heads
        for t in range(0, self.tokens, self.chunk):
            out = self._convolve(t, y[:, t : t + self.chunk])
            F.silu(out, inplace=True)
            if heads.length is not None:
                square = torch.mul(out, out, out=scratch[:, : out.shape[1]]).sum(-1, keepdim=True)
                out *= square.add_(EPS).rsqrt_().mul_(heads.length)
        return y.flatten(2, 3)

    def backward(self, grad_BTHD: Tensor, d_x: Tensor, d_weight: Tensor, d_bias: Tensor | None) -> None:
        """Chunks from the last to the first; `d_pre` ends in the first tokens of the chunk after it."""
        d_x, past = self._columns(d_x), len(self.taps) - 1
        grad = grad_BTHD.unflatten(2, self.taps.shape[1:3])
        d_taps, d_constant = torch.zeros_like(self.taps), torch.zeros_like(self.taps[0])
        d_pre, scratch, *more = (self._empty(self.chunk + extra) for extra in (past, 0, 0, 0))
        d_pre[:, :past] = 0
        for t in reversed(range(0, self.tokens, self.chunk)):
            size = min(self.chunk, self.tokens - t)
            d_pre[:, size : size + past] = d_pre[:, :past].clone()
            buffers = [x[:, :size] for x in (d_pre, scratch, *more)]
            here = self._activation_backward(grad[:, t : t + size], t, *buffers)
            self._pull_back(d_pre, t, d_x[:, t : t + size])
            for lag in range(past + 1):
                if (skip := max(0, lag - t)) < size:
                    seen = self._seen(t + skip, t + size, lag)
                    d_taps[lag] += torch.mul(here[:, skip:], seen, out=scratch[:, skip:size]).sum((0, 1))
            if d_bias is not None:
                d_constant += here.sum((0, 1))
        d_weight[self.channels] = d_taps.flip(0).flatten(1).mT
        if d_bias is not None:
            d_bias[self.channels] = d_constant.flatten()

    def _activation_backward(
        self, grad: Tensor, t: int, out: Tensor, scratch: Tensor, sigmoid: Tensor, y: Tensor
    ) -> Tensor:
        """The gradient of what the SiLU takes, in `out`; the last three are only written on."""
        pre = self._convolve(t, scratch)
        if self.heads.length is None:
            return torch.ops.aten.silu_backward.grad_input(grad, pre, grad_input=out)
        torch.mul(pre, torch.sigmoid(pre, out=sigmoid), out=y)
        inverse = torch.mul(y, y, out=out).sum(-1, keepdim=True).add_(EPS).rsqrt_()
        along = torch.mul(grad, y, out=out).sum(-1, keepdim=True).mul_(inverse.square())
        torch.addcmul(grad, y, along, value=-1, out=out).mul_(inverse.mul_(self.heads.length))
        slope = y.addcmul_(y, sigmoid, value=-1).add_(sigmoid)  # d silu = sigmoid + silu (1 - sigmoid)
        return out.mul_(slope)

    def _pull_back(self, d_pre: Tensor, t: int, d_x: Tensor) -> None:
        """The gradient of x: what each token gave to itself and to those after it, summed over the repeats."""
        size = d_x.shape[1]
        for repeat in range(d_pre.shape[3]):
            for lag, tap in enumerate(self.taps[:, :, repeat : repeat + 1]):
                later = d_pre[:, lag : lag + size, :, repeat : repeat + 1]
                if (same := self.same[lag]) is not None:
                    known = same[:, t + lag : t + lag + size]
                    later = later * F.pad(known, (0, 0, 0, 0, 0, 0, 0, size - known.shape[1]))
                if repeat == lag == 0:
                    torch.mul(later, tap, out=d_x)
                else:
                    d_x.addcmul_(later, tap)
