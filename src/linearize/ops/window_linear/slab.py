"""A slab of chunks: window part, linear part and division in one go, so that what is large stays in the cache.

The backward pass computes weights and memories again; nothing quadratic and no memory per chunk is kept. Values,
memories and outputs are held transposed, tokens or features last: the other way round narrow products are slow.

Letters: B batch, N chunks of the slab, M = N + 2 (with the two before it), G key/value heads, R query heads for each,
H = G R, C chunk size, J sinks, K = J + 2 C keys of a tile, D head dimension, V value dimension, W = V + 1 (values and
a one), F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from linearize.ops.products import product


@dataclass(frozen=True, eq=False)
class Slab:
    """What a slab's queries may see, and the options of the operation.

    `hidden`: [B or 1, N, 1, C, K], keys not seen by softmax (None: no window part). `far`: [B or 1, N, 1, C, 2 C], keys
    of the tile that are seen by features (None: none is). `fold`: [B or 1, N, 1, 1, C], 1 for each token of chunk n - 2
    that the memory takes up before chunk n, else 0. `keep`: [B or 1, N, 1, 1, 1], 0 where a document opens (None:
    nowhere).
    """

    hidden: Tensor | None
    far: Tensor | None
    fold: Tensor
    keep: Tensor | None
    scaling: float
    softcap: float | None
    shared_shift: bool

    def part(self, chunks: slice) -> Slab:
        """The masks of some of the chunks."""
        names = ("hidden", "far", "fold", "keep")
        return replace(self, **{name: x[:, chunks] for name in names if (x := getattr(self, name)) is not None})


def attend_slab(
    q_BNHCD: Tensor,
    k_BMGCD: Tensor,
    v_BMGCV: Tensor,
    sinks: Sequence[Tensor],
    phi: tuple[Tensor, Tensor] | None,
    memory_BHWF: Tensor | None,
    log_g_H: Tensor,
    slab: Slab,
) -> tuple[Tensor, Tensor | None]:
    """`y: [B, H, N, C, V]` and the memory that the slab's last chunk sees.

    `sinks`: k and v of the document's first tokens, `[B, N, G, J, D]` and `[B, N, G, J, V]`, or nothing. `phi`: phi_q
    `[B, N, H, C, F]`, and phi_k of the chunks n - 2, or of all M chunks where `slab.far` is given.
    """
    y, memory = _Slab.apply(
        q_BNHCD, k_BMGCD, v_BMGCV, *(sinks or (None, None)), *(phi or (None, None)), memory_BHWF, log_g_H, slab
    )
    return y, memory


def _pairs(x: Tensor, dim: int) -> Tensor:
    """Chunks n - 1 and n side by side."""
    return torch.cat([x[:, 1:-1], x[:, 2:]], dim=dim)


def _unpair(d_tile: Tensor, dim: int) -> Tensor:
    """The transpose of `_pairs`."""
    before, own = d_tile.chunk(2, dim=dim)
    d_x = own.new_zeros(own.shape[0], own.shape[1] + 2, *own.shape[2:])
    d_x[:, 2:] = own
    d_x[:, 1:-1] += before
    return d_x


def _with_ones(v: Tensor) -> Tensor:
    """[v, 1] transposed: `[..., C, V] -> [..., W, C]`."""
    value = v.new_empty(*v.shape[:-2], v.shape[-1] + 1, v.shape[-2])
    value[..., :-1, :] = v.mT
    value[..., -1, :] = 1
    return value


def _by_group(x_BNHXC: Tensor, groups: int) -> Tensor:
    """The heads of a group side by side: `[B, N, H, X, C] -> [B, N, G, X, R C]`."""
    return x_BNHXC.unflatten(2, (groups, -1)).transpose(3, 4).flatten(4)


def _by_head(x_BNGXK: Tensor, tokens: int) -> Tensor:
    """The transpose of `_by_group`."""
    return x_BNGXK.unflatten(4, (-1, tokens)).transpose(3, 4).flatten(2, 3)


def _repeat(x_BNGXY: Tensor, heads: int) -> Tensor:
    groups = x_BNGXY.shape[2]
    return x_BNGXY if groups == heads else x_BNGXY.repeat_interleave(heads // groups, dim=2)


def _sum_heads(x_BNHXY: Tensor, groups: int) -> Tensor:
    return x_BNHXY if x_BNHXY.shape[2] == groups else x_BNHXY.unflatten(2, (groups, -1)).sum(3)


class _Window:
    """The softmax part: scores of a slab's queries against their tiles."""

    def __init__(self, q: Tensor, k: Tensor, value: Tensor, sink_k: Tensor | None, sink_v: Tensor | None, slab: Slab):
        self.slab, self.heads, self.groups, self.tokens = slab, q.shape[2], k.shape[2], q.shape[3]
        self.rows = q.unflatten(2, (self.groups, -1)).flatten(3, 4)  # [B, N, G, R C, D]
        self.k, self.value = _pairs(k, -2), _pairs(value, -1)
        if sink_k is not None and sink_v is not None:
            self.k = torch.cat([sink_k, self.k], dim=-2)
            self.value = torch.cat([_with_ones(sink_v), self.value], dim=-1)
        self.bent: Tensor | None = None

    def scores(self) -> Tensor:
        """Masked scores, `[B, N, H, C, K]`."""
        softcap = self.slab.softcap
        s = product(self.rows * self.slab.scaling, self.k.mT)
        if softcap is not None:
            self.bent = torch.tanh(s / softcap)
            s = softcap * self.bent
        assert self.slab.hidden is not None
        return s.view(*s.shape[:2], self.heads, self.tokens, -1).masked_fill_(self.slab.hidden, -torch.inf)

    def shift(self, s: Tensor) -> Tensor:
        """m_n, `[B, N, H, C, 1]`."""
        c = s.amax(-1, keepdim=True)
        return c.clamp_(min=0) if self.slab.shared_shift else c.masked_fill_(torch.isinf(c), 0)

    def total(self, p: Tensor) -> Tensor:
        """sum_i p_ni [v_i, 1], `[B, N, H, W, C]`."""
        return _by_head(product(self.value, p.unflatten(2, (self.groups, -1)).flatten(3, 4).mT), self.tokens)

    def backward(self, d_total: Tensor, m: Tensor, log_g: Tensor) -> tuple[Tensor, ...]:
        """Gradients of q, of the tile's keys and values, and of log g."""
        s = self.scores()
        top = None if self.slab.shared_shift else s.argmax(-1, keepdim=True)
        p = s.sub_(m - log_g[:, None, None]).exp_()
        d_rows, p_rows = _by_group(d_total, self.groups), p.view(*self.rows.shape[:-1], -1)
        d_value = product(d_rows, p_rows)
        d_s = product(d_rows.mT, self.value).mul_(p_rows).view(p.shape)
        row = d_s.sum(-1, keepdim=True)
        if top is not None:  # as published the shift is c_n itself, and the linear term does not share it
            d_s.scatter_add_(-1, top, -row)
        d_s = d_s.view(p_rows.shape)
        if self.bent is not None:
            d_s.mul_(1 - self.bent.square())
        d_q = product(d_s, self.k).mul_(self.slab.scaling)
        d_k = product(d_s.mT, self.rows).mul_(self.slab.scaling)
        return d_q.unflatten(3, (-1, self.tokens)).flatten(2, 3), d_k, d_value, row.sum((0, 1, 3, 4))


class _Linear:
    """The linear part: the memory that each chunk sees, and the keys of its tile that lie beyond the window."""

    def __init__(self, value: Tensor, phi_q: Tensor, phi_k: Tensor, memory: Tensor, slab: Slab) -> None:
        self.slab, self.groups, heads = slab, value.shape[2], phi_q.shape[2]
        self.phi_q, self.folded = phi_q, phi_k if slab.far is None else phi_k[:, :-2]
        self.value = _repeat(value[:, :-2] * slab.fold, heads)
        self.memories = product(self.value, self.folded)
        for n in range(self.memories.shape[1]):
            now = self.memories[:, n].add_(self.memories[:, n - 1] if n else memory)
            if slab.keep is not None:
                now.mul_(slab.keep[:, n])
        self.beyond: Tensor | None = None
        if slab.far is not None:
            self.tile_phi, self.tile_value = _pairs(phi_k, -2), _repeat(_pairs(value, -1), heads)
            self.beyond = product(phi_q, self.tile_phi.mT).mul_(slab.far)

    def total(self) -> Tensor:
        """phi_q^T (sum of phi_k [v, 1]^T), `[B, N, H, W, C]`."""
        total = product(self.memories, self.phi_q.mT)
        return total if self.beyond is None else total.add_(product(self.tile_value, self.beyond.mT))

    def backward(self, d_total: Tensor, d_memory: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of phi_q, phi_k, of all values and of the carried memory."""
        d_phi_q = product(d_total.mT, self.memories)
        d_memories = product(d_total, self.phi_q)
        for n in range(d_memories.shape[1] - 1, -1, -1):
            later = d_memories[:, n + 1] if n + 1 < d_memories.shape[1] else d_memory
            now = d_memories[:, n]
            if later is not None:
                now.add_(later)
            if self.slab.keep is not None:
                now.mul_(self.slab.keep[:, n])
        d_phi_k = product(self.value.mT, d_memories)
        d_folded = _sum_heads(product(d_memories, self.folded.mT), self.groups) * self.slab.fold
        d_value = torch.nn.functional.pad(d_folded, (0, 0) * 3 + (0, 2))
        if self.beyond is not None and self.slab.far is not None:
            d_a = product(d_total.mT, self.tile_value).mul_(self.slab.far)
            d_phi_q = d_phi_q.add_(product(d_a, self.tile_phi))
            d_phi_k = torch.nn.functional.pad(d_phi_k, (0, 0) * 3 + (0, 2))
            d_phi_k += _unpair(product(d_a.mT, self.phi_q), -2)
            d_value += _unpair(_sum_heads(product(d_total, self.beyond), self.groups), -1)
        return d_phi_q, d_phi_k, d_value, d_memories[:, 0]


class _Slab(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink_k: Tensor | None,
        sink_v: Tensor | None,
        phi_q: Tensor | None,
        phi_k: Tensor | None,
        memory: Tensor | None,
        log_g: Tensor,
        slab: Slab,
    ) -> tuple[Tensor, Tensor | None]:
        value, total, m, after = _with_ones(v), None, None, None
        if slab.hidden is not None:
            window = _Window(q, k, value, sink_k, sink_v, slab)
            s = window.scores()
            m = window.shift(s)
            total = window.total(s.sub_(m - log_g[:, None, None]).exp_())
        if phi_q is not None and phi_k is not None and memory is not None:
            part = _Linear(value, phi_q, phi_k, memory, slab)
            linear, after = part.total(), part.memories[:, -1].clone()
            if m is not None and slab.shared_shift:
                linear.mul_(m.neg().exp_().mT)
            total = linear if total is None else total.add_(linear)
        assert total is not None
        normaliser = total[..., -1:, :]
        normaliser = normaliser.masked_fill(normaliser == 0, 1)
        batch, chunks, heads, tokens = q.shape[:4]
        y = q.new_empty(batch, heads, chunks, tokens, v.shape[-1])
        torch.div(total[..., :-1, :], normaliser, out=y.permute(0, 2, 1, 4, 3))
        ctx.save_for_backward(q, k, v, sink_k, sink_v, phi_q, phi_k, memory, log_g, m, normaliser, y)
        ctx.slab = slab
        ctx.set_materialize_grads(False)
        return y, after

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sink_k, sink_v, phi_q, phi_k, memory, log_g, m, normaliser, y = ctx.saved_tensors
        slab: Slab = ctx.slab
        d_total = _backward_division(grads[0], normaliser, y)
        value = _with_ones(v)
        d_q = d_k = d_sink_k = d_sink_v = d_phi_q = d_phi_k = d_memory = d_log_g = None
        d_value = torch.zeros((), dtype=v.dtype, device=v.device)
        if m is not None:
            window = _Window(q, k, value, sink_k, sink_v, slab)
            d_q, d_tile_k, d_tile_value, d_log_g = window.backward(d_total, m, log_g)
            del window
            if sink_k is not None:
                sinks = sink_k.shape[-2]
                d_sink_k, d_sink_v = d_tile_k[..., :sinks, :], d_tile_value[..., :-1, :sinks].mT
                d_tile_k, d_tile_value = d_tile_k[..., sinks:, :], d_tile_value[..., sinks:]
            d_k, d_value = _unpair(d_tile_k, -2), _unpair(d_tile_value, -1)
        if phi_q is not None:
            d_linear = d_total if m is None or not slab.shared_shift else d_total.mul_(m.neg().exp_().mT)
            part = _Linear(value, phi_q, phi_k, memory, slab)
            d_phi_q, d_phi_k, d_more, d_memory = part.backward(d_linear, grads[1])
            d_value = d_value + d_more
        return d_q, d_k, d_value[..., :-1, :].mT, d_sink_k, d_sink_v, d_phi_q, d_phi_k, d_memory, d_log_g, None


def _backward_division(d_y: Tensor | None, normaliser: Tensor, y_BHNCV: Tensor) -> Tensor:
    """Gradient of numerator and normaliser, `[B, N, H, W, C]`, from that of y."""
    y = y_BHNCV.permute(0, 2, 1, 4, 3)
    d_total = y_BHNCV.new_zeros(*y.shape[:3], y.shape[3] + 1, y.shape[4])
    if d_y is not None:
        torch.div(d_y.permute(0, 2, 1, 4, 3), normaliser, out=d_total[..., :-1, :])
        torch.sum(d_total[..., :-1, :] * y, dim=-2, out=d_total[..., -1, :]).neg_()
    return d_total
