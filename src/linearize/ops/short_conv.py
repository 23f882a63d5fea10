"""Causal depthwise convolution over a few tokens: what recurrent mixers run over their inputs before the recurrence.

y_t = bias + sum_j weight[:, K - 1 - j] x_{t - j}, over tokens t - j of the same document only.

Letters: B batch, T tokens, C channels, K taps, P = K - 1 past inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from linearize.ops.blocking import alike
from linearize.ops.layout import Layout

CHUNK_NUMBERS = 1 << 17  # numbers worked on at a time: they stay in a processor's cache over all taps


def short_conv(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None = None,
    *,
    layout: Layout,
    taps_BKC: Tensor | None = None,
    need_state: bool = True,
    commit: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Convolve; returns `y: [B, T, C]` in the dtype of x and the last K - 1 inputs (None unless `need_state`).

    `weight_CK`: the last column multiplies the current token (torch's Conv1d). `taps_BKC`: the K - 1 inputs before
    these, oldest first (None: zeros). Dead tokens are skipped, and no tap reaches into another document. Half precision
    is computed in fp32 and the taps keep the dtype of x. `commit`: the inputs returned are the last ones of the first
    `commit` tokens (None: of all).
    """
    past, dtype = weight_CK.shape[1] - 1, x_BTC.dtype
    extended = F.pad(x_BTC, (0, 0, past, 0)) if taps_BKC is None else torch.cat([taps_BKC.to(dtype), x_BTC], dim=1)
    document = _documents(layout, past, x_BTC)
    after = _last_inputs(extended, document, layout, past, commit) if need_state else None
    back = None
    if layout.gaps():
        extended, document, back = _without_gaps(extended, document, layout, past)
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(x_BTC.device.type, enabled=False):
        bias = None if bias_C is None else bias_C.to(wide)
        y = _ShortConv.apply(extended.to(wide), weight_CK.to(wide), bias, document)
    y = y.to(dtype)
    return y if back is None else y.gather(1, back[:, :, None].expand(-1, -1, y.shape[2])), after


def _documents(layout: Layout, past: int, x_BTC: Tensor) -> Tensor | None:
    """Which document each past and each new input belongs to, `[B or 1, P + T]`; 0 is that of the taps."""
    key = ("short_conv", past, x_BTC.shape[1])
    if key not in layout.memo:
        starts = layout.starts(x_BTC.shape[1], x_BTC.device)
        layout.memo[key] = None if starts is None else F.pad(starts, (past, 0)).long().cumsum(-1)
    document_BS = layout.memo[key]
    assert document_BS is None or isinstance(document_BS, Tensor)
    return document_BS


def _order(layout: Layout, past: int, tokens: int) -> Tensor:
    """Slots of the past inputs and the first `tokens` new ones, the dead first: `[B or 1, P + tokens]`."""
    live = layout.live()
    assert live is not None
    return F.pad(live[:, :tokens], (past, 0), value=True).long().argsort(dim=1, stable=True)


def _without_gaps(
    extended_BSC: Tensor, document_BS: Tensor | None, layout: Layout, past: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The inputs with the dead ones in front, their documents, and where the output of each token then is, `[B, T]`."""
    batch, size = extended_BSC.shape[:2]
    order = _order(layout, past, size - past).expand(batch, -1)
    moved = extended_BSC.gather(1, order[:, :, None].expand(-1, -1, extended_BSC.shape[2]))
    document = None if document_BS is None else document_BS.expand(batch, -1).gather(1, order)
    return moved, document, (order.argsort(dim=1)[:, past:] - past).clamp(min=0)


def _last_inputs(
    extended_BSC: Tensor, document_BS: Tensor | None, layout: Layout, past: int, commit: int | None
) -> Tensor:
    """The last P inputs of live tokens; zeros for those before the start of the last document."""
    tokens = extended_BSC.shape[1] - past if commit is None else commit
    if document_BS is None and layout.live() is None:
        return extended_BSC[:, tokens : tokens + past].clone()
    batch, device = extended_BSC.shape[0], extended_BSC.device
    if layout.live() is None:
        index = torch.arange(tokens, tokens + past, device=device).expand(batch, -1)
    else:
        index = _order(layout, past, tokens)[:, tokens:].expand(batch, -1)
    taken = extended_BSC.gather(1, index[:, :, None].expand(-1, -1, extended_BSC.shape[2]))
    if document_BS is None or past == 0:
        return taken
    document = document_BS.expand(batch, -1).gather(1, index)
    return taken * (document == document[:, -1:])[:, :, None].to(taken.dtype)


class _ShortConv(torch.autograd.Function):
    """The convolution chunk by chunk, forward and backward: several times as fast as torch's depthwise Conv1d here."""

    @staticmethod
    def forward(
        ctx: Any, x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, document_BS: Tensor | None
    ) -> Tensor:
        columns = weight_CK.mT.contiguous()
        past = columns.shape[0] - 1
        y = x_BSC.new_empty(x_BSC.shape[0], x_BSC.shape[1] - past, x_BSC.shape[2])
        chunk = _chunk_tokens(y)
        for t in alike(range(0, y.shape[1], chunk)):
            out = y[:, t : t + chunk]
            torch.mul(x_BSC[:, t + past : t + past + out.shape[1]], columns[past], out=out)
            if bias_C is not None:
                out += bias_C
            for lag in range(1, past + 1):
                first = t + past - lag
                seen = x_BSC[:, first : first + out.shape[1]]
                out.addcmul_(_same(seen, document_BS, first, lag), columns[past - lag])
        ctx.save_for_backward(x_BSC, columns, document_BS)
        ctx.has_bias = bias_C is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, columns, document = ctx.saved_tensors
        past = columns.shape[0] - 1
        d_x, d_columns, chunk = torch.zeros_like(x), torch.zeros_like(columns), _chunk_tokens(d_y)
        for t in alike(range(0, d_y.shape[1], chunk)):
            d_out = d_y[:, t : t + chunk]
            for lag in range(past + 1):
                first = t + past - lag
                here = slice(first, first + d_out.shape[1])
                d_tap = _same(d_out, document, first, lag)
                d_x[:, here].addcmul_(d_tap, columns[past - lag])
                d_columns[past - lag] += (d_tap * x[:, here]).sum((0, 1))
        return d_x, d_columns.mT, d_y.sum((0, 1)) if ctx.has_bias else None, None


def _chunk_tokens(y_BTC: Tensor) -> int:
    """Tokens worked on at a time."""
    return max(16, CHUNK_NUMBERS // max(1, y_BTC.shape[0] * y_BTC.shape[2]))


def _same(x_BNC: Tensor, document_BS: Tensor | None, first: int, lag: int) -> Tensor:
    """x where the input at slots `first ...` is of the document of the token `lag` later, 0 elsewhere."""
    if document_BS is None or lag == 0:
        return x_BNC
    size = x_BNC.shape[1]
    same = document_BS[:, first : first + size] == document_BS[:, first + lag : first + lag + size]
    return x_BNC * same[:, :, None].to(x_BNC.dtype)
