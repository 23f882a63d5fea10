"""The two terms of one query head in each group of a block: softmax over tiles, and memories read by features.

A tile is what the queries of a chunk see of keys and values: two chunks side by side, sinks in front. Exponents are of
base 2, which is faster: scores come out of their product times log2(e).

Letters: b rows, g (G) groups, N chunks of the chunk group, M = N + 2 (with the two before it), P = b g N, C chunk, J
sinks, K = J + 2 C keys of a tile, D head dimension, V value dimension, W = V + 1 (values and a one), F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops.blocking import Scratch, alike
from linearize.ops.matmul import LOG2_E, product_into, whole_products


def tiles(x_BGMCD: Tensor) -> Tensor:
    """Chunks n - 1 and n side by side, `[P, 2 C, D]`: a view where one head of one row is given, else a copy."""
    batch, groups, chunks, chunk, dim = x_BGMCD.shape
    strides = x_BGMCD.stride()
    assert strides[2] == chunk * strides[3]
    pairs = x_BGMCD[:, :, 1:].as_strided((batch, groups, chunks - 2, 2 * chunk, dim), strides)
    return pairs.flatten(0, 2)


def with_sinks(sink_BGNJD: Tensor | None, tile_PKD: Tensor) -> Tensor:
    """The sinks in front of the tiles, `[P, J + 2 C, D]`."""
    return tile_PKD if sink_BGNJD is None else torch.cat([sink_BGNJD.flatten(0, 2), tile_PKD], dim=1)


def value_rows(v_BGMCV: Tensor, memory: Scratch) -> Tensor:
    """[v, 1]: one product then gives numerator and normaliser together, `[b, g, M, C, W]`."""
    value = memory.rows("value", *v_BGMCV.shape[:-1], v_BGMCV.shape[-1] + 1, like=v_BGMCV)
    value[..., :-1] = v_BGMCV
    value[..., -1] = 1
    return value


class SoftmaxPart:
    """Scores `[P, C, K]` of queries `[P, C, D]` against the keys of their tiles.

    `bias`: 0 and minus infinity, `[b or 1, 1, N or 1, C, K]`, for scores seen as `shape = [b, g, N, C, K]`.
    """

    def __init__(
        self,
        q_PCD: Tensor,
        k_PKD: Tensor,
        bias: Tensor,
        shape: tuple[int, ...],
        scaling: float,
        softcap: float | None,
        memory: Scratch,
    ):
        self.q, self.k, self.scaling, self.softcap, self.memory = q_PCD, k_PKD, scaling, softcap, memory
        self.s = memory("scores", *shape, like=q_PCD)
        self.flat = self.s.flatten(0, 2)
        self.bent: Tensor | None = None
        if softcap is None:
            self.s.copy_(bias)
            product_into(self.flat, q_PCD, k_PKD.mT, beta=1, alpha=scaling * LOG2_E)
            return
        self.bent = memory("bent", *shape, like=q_PCD)
        product_into(self.bent, q_PCD, k_PKD.mT, alpha=scaling / softcap)
        torch.add(bias, self.bent.tanh_(), alpha=softcap * LOG2_E, out=self.s)

    def largest(self) -> Tensor:
        """c_n times log2(e), `[P, C, 1]`; minus infinity where nothing is seen."""
        return self.flat.amax(-1, keepdim=True)

    def weights(self, shift_PC1: Tensor) -> Tensor:
        """2^(s - shift) in the place of the scores, `[P, C, K]`."""
        self.flat.sub_(shift_PC1)
        return torch.exp2(self.flat, out=self.flat)

    def tops(self, c_PC1: Tensor) -> Tensor:
        """1 at the largest score of each row (shared out where there are several), 0 elsewhere: the gradient of c."""
        top = torch.eq(self.flat, c_PC1, out=self.memory("top", *self.flat.shape, like=self.flat))
        return top.div_(top.sum(-1, keepdim=True))

    def d_scores(
        self, d_total_PCW: Tensor, value_PKW: Tensor, p_PCK: Tensor, tops: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the scores, but for the scaling, and of log g for each query, `[P, C, 1]`."""
        d_s = self.memory("d_scores", *p_PCK.shape, like=p_PCK)
        with whole_products():
            product_into(d_s, d_total_PCW, value_PKW.mT).mul_(p_PCK)
        row = d_s.sum(-1, keepdim=True)
        if tops is not None:  # as published the shift is c_n itself, and the linear term does not share it
            d_s.addcmul_(tops, row, value=-1)
        if self.bent is not None:
            bent = self.bent.flatten(0, 2)
            d_s.addcmul_(d_s * bent, bent, value=-1)
        return d_s, row


class LinearPart:
    """The memory that each chunk sees, `[b, g, N, W, F]`: what came before the chunk group and chunks up to n - 2."""

    def __init__(
        self, value: Tensor, phi_k: Tensor, carried: Tensor, fold: Tensor | None, keep: Tensor | None, memory: Scratch
    ) -> None:
        """`value`: [b, g, N, C, W], [v, 1] of chunks n - 2. `phi_k`: theirs, `[b, g, N, C, F]`.

        `carried`: [b, g, W, F], the sum before the chunk group. `fold`: [b or 1, 1, N, C, 1], which tokens are taken up
        (None: all). `keep`: [b or 1, 1, N, 1, 1].
        """
        self.scratch, self.keep, self.fold = memory, keep, fold
        if fold is not None:
            masked = memory.rows("folded_value", *value.shape, like=value)
            value = torch.mul(value, fold, out=masked)
        self.value, self.phi_k = value.flatten(0, 2), phi_k.flatten(0, 2)
        shape = (*value.shape[:3], value.shape[-1], phi_k.shape[-1])
        self.memories = memory("memories", *shape, like=phi_k)
        product_into(self.memories, self.value.mT, self.phi_k)
        self.by_chunk = self.memories.unbind(2)
        for n in alike(range(len(self.by_chunk))):
            torch.add(self.by_chunk[n], self.by_chunk[n - 1] if n else carried, out=self.by_chunk[n])
            self._forget(self.by_chunk[n], n)
        self.last = self.by_chunk[-1]

    def _forget(self, x: Tensor, n: int) -> None:
        if self.keep is not None:
            x.mul_(self.keep[:, :, n])

    def read(self, phi_q_PCF: Tensor, y_PCV: Tensor) -> Tensor:
        """phi_q^T S into `y`, and the normaliser phi_q^T z, `[P, C, 1]`."""
        memories = self.memories.flatten(0, 2)
        product_into(y_PCV, phi_q_PCF, memories[:, :-1].mT)
        weighed = self.scratch("weighed", *phi_q_PCF.shape, like=phi_q_PCF)
        return torch.mul(phi_q_PCF, memories[:, -1:], out=weighed).sum(-1, keepdim=True)

    def d_queries(self, d_total_PCW: Tensor, d_phi_q: Tensor) -> None:
        """The gradient of the features of queries, into `[b, g, N, C, F]`."""
        product_into(d_phi_q, d_total_PCW, self.memories.flatten(0, 2))

    def d_memories(
        self,
        d_total_PCW: Tensor,
        phi_q_PCF: Tensor,
        d_phi_k: Tensor | None,
        d_v: Tensor | None,
        d_later: Tensor | None,
    ) -> Tensor:
        """Gradients into `d_phi_k: [b, g, N, C, F]` (set) and `d_v: [b, g, N, C, V]` (added to), those of chunks n - 2;
        returned: that of the carried memory. `d_later`: of the memory after the chunk group."""
        d_memories = self.scratch("d_memories", *self.memories.shape, like=phi_q_PCF)
        flat = product_into(d_memories, d_total_PCW.mT, phi_q_PCF).flatten(0, 2)
        by_chunk, last = d_memories.unbind(2), d_memories.shape[2] - 1
        if d_later is not None:
            torch.add(by_chunk[last], d_later, out=by_chunk[last])
        self._forget(by_chunk[last], last)
        for n in alike(range(last), reverse=True):
            torch.add(by_chunk[n], by_chunk[n + 1], out=by_chunk[n])
            self._forget(by_chunk[n], n)
        if d_phi_k is not None:
            product_into(d_phi_k, self.value, flat)
        if d_v is None:
            return by_chunk[0]
        if self.fold is None:
            product_into(d_v, self.phi_k, flat[:, :-1].mT, beta=1)
        else:
            d_values = product_into(self.scratch("d_folded", *d_v.shape, like=d_v), self.phi_k, flat[:, :-1].mT)
            d_v.addcmul_(d_values, self.fold)
        return by_chunk[0]
