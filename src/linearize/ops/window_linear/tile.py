"""The two products with an exponential or a running sum in them, with backward passes that store nothing quadratic.

`window_tiles`: softmax terms of each chunk's queries against its tile of keys; the weights are computed again in the
backward pass.
`chunk_memories`: for each chunk, the sum of the outer products of the chunks before its tile.

Letters: B batch, N chunks, G key/value heads, H query heads, C chunk size, K keys of a tile, D head dimension, V, F
features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.ops.window_linear.spec import WindowLinear

SLAB = 1 << 19  # scores handled at a time: a few of these matrices fit a processor's last-level cache


def window_tiles(
    q_BNHCD: Tensor, k_BNGKD: Tensor, v_BNGKV: Tensor, hidden_BN1CK: Tensor, spec: WindowLinear
) -> tuple[Tensor, Tensor]:
    """sum_i g exp(s_ni - m_n) v_i over the keys of the tile that are not hidden, `[B, N, H, C, V]`; and m, `[B, N, H,
    C, 1]`.

    `hidden_BN1CK` may have batch 1. The gradient through m is that of c_n as published, none when the shift is shared.
    """
    factor = (
        q_BNHCD.new_zeros(q_BNHCD.shape[2])
        if spec.log_window_factor_H is None
        else spec.log_window_factor_H.to(q_BNHCD.dtype)
    )
    total, m = _WindowTiles.apply(
        q_BNHCD, k_BNGKD, v_BNGKV, hidden_BN1CK, factor, spec.scaling, spec.softcap, spec.shared_shift
    )
    return total, m


def _slabs(q: Tensor, keys: int) -> list[slice]:
    """Ranges of chunks whose scores fill one slab."""
    per_chunk = q.shape[0] * q.shape[2] * q.shape[3] * keys
    step = max(1, SLAB // per_chunk)
    return [slice(n, n + step) for n in range(0, q.shape[1], step)]


def _product(a_BNHCX: Tensor, b_BNGXY: Tensor) -> Tensor:
    """a @ b where each group of H / G heads shares its b: `[B, N, H, C, Y]`, without repeating b."""
    shape, groups = a_BNHCX.shape, b_BNGXY.shape[2]
    a = a_BNHCX.reshape(-1, shape[2] // groups * shape[3], shape[4])
    return torch.bmm(a, b_BNGXY.reshape(-1, *b_BNGXY.shape[3:])).view(*shape[:4], -1)


def _transposed(a_BNHCX: Tensor, b_BNHCY: Tensor, groups: int) -> Tensor:
    """a^T b summed over the heads of each group, `[B, N, G, X, Y]`."""
    shape = a_BNHCX.shape
    rows = shape[2] // groups * shape[3]
    a, b = a_BNHCX.reshape(-1, rows, shape[4]), b_BNHCY.reshape(-1, rows, b_BNHCY.shape[4])
    return torch.bmm(a.transpose(1, 2), b).view(*shape[:2], groups, shape[4], -1)


def _scores(
    q: Tensor, k: Tensor, hidden: Tensor, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Masked scores, and tanh(s / softcap) where there is a softcap."""
    s = _product(q * scaling, k.transpose(-1, -2))
    bent = None
    if softcap is not None:
        bent = torch.tanh(s / softcap)
        s = softcap * bent
    return s.masked_fill_(hidden, -torch.inf), bent


class _WindowTiles(torch.autograd.Function):
    """Recomputes the weights in the backward pass: memory stays linear in T."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, log_g: Tensor, *options: Any
    ) -> tuple[Tensor, Tensor]:
        scaling, softcap, shared = options
        total, shifts = q.new_empty(*q.shape[:4], v.shape[-1]), q.new_empty(*q.shape[:4], 1)
        for n in _slabs(q, k.shape[3]):
            s, _ = _scores(q[:, n], k[:, n], hidden[:, n], scaling, softcap)
            c = s.amax(-1, keepdim=True)
            shifts[:, n] = m = c.clamp_(min=0) if shared else c.masked_fill_(torch.isinf(c), 0)
            p = s.sub_(m - log_g[:, None, None]).exp_()
            total[:, n] = _product(p, v[:, n])
        ctx.save_for_backward(q, k, v, hidden, log_g, shifts)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return total, shifts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, hidden, log_g, m = ctx.saved_tensors
        scaling, softcap, shared = ctx.options
        d_q, d_k, d_v, d_log_g = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.zeros_like(log_g)
        d_total, groups = grads[0], k.shape[2]
        assert d_total is not None
        for n in _slabs(q, k.shape[3]):
            s, bent = _scores(q[:, n], k[:, n], hidden[:, n], scaling, softcap)
            top = None if shared else s.argmax(-1, keepdim=True)
            p = s.sub_(m[:, n] - log_g[:, None, None]).exp_()
            d_v[:, n] = _transposed(p, d_total[:, n], groups)
            d_s = _product(d_total[:, n], v[:, n].transpose(-1, -2)).mul_(p)
            row = d_s.sum(-1, keepdim=True)
            d_log_g += row.sum((0, 1, 3, 4))
            if top is not None:  # as published the shift is c_n itself, and the linear term does not share it
                d_s.scatter_add_(-1, top, -row)
            if bent is not None:
                d_s.mul_(1 - bent.square())
            d_s.mul_(scaling)
            d_q[:, n] = _product(d_s, k[:, n])
            d_k[:, n] = _transposed(d_s, q[:, n], groups)
        return d_q, d_k, d_v, None, d_log_g, None, None, None


def chunk_memories(added_BNHFV: Tensor, start_BHFV: Tensor | None, keep_BN: Tensor, add_BN: Tensor) -> Tensor:
    """U_n = keep_n (U_{n-1} + add_n A_{n-2}), U_0 = keep_0 start: the memory that chunk n's queries see, `[B, N, H,
    F, V]`.

    Chunk n's tile holds chunks n - 1 and n, so its memory ends with chunk n - 2; `keep`, `add`: [B or 1, N], false
    across documents.
    """
    start = added_BNHFV.new_zeros(added_BNHFV[:, 0].shape) if start_BHFV is None else start_BHFV
    out: Tensor = _ChunkMemories.apply(added_BNHFV, start, keep_BN, add_BN)
    return out


def _factors(flags_BN: Tensor, like: Tensor) -> Tensor:
    return flags_BN.to(like.dtype)[..., None, None, None]


class _ChunkMemories(torch.autograd.Function):
    """A linear recurrence over chunks and its transpose."""

    @staticmethod
    def forward(ctx: Any, added: Tensor, start: Tensor, keep: Tensor, add: Tensor) -> Tensor:
        ctx.save_for_backward(keep, add)
        keep, add = _factors(keep, added), _factors(add & keep, added)
        out = torch.empty_like(added)
        out[:, 0] = start * keep[:, 0]
        for n in range(1, added.shape[1]):
            torch.mul(out[:, n - 1], keep[:, n], out=out[:, n])
            if n > 1:
                out[:, n].addcmul_(added[:, n - 2], add[:, n])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        keep, add = ctx.saved_tensors
        grad = grads[0]
        keep, add = _factors(keep, grad), _factors(add & keep, grad)
        d_added, running = torch.zeros_like(grad), torch.zeros_like(grad[:, 0])
        for n in range(grad.shape[1] - 1, 0, -1):
            running.add_(grad[:, n])
            if n > 1:
                torch.mul(running, add[:, n], out=d_added[:, n - 2])
            running.mul_(keep[:, n])
        return d_added, (running + grad[:, 0]) * keep[:, 0], None, None
