"""The linear part of one query head in each group of a block: memories, what queries read of them, gradients.

Letters: b rows, g groups, N chunks of the chunk group, P = b g N, C chunk, V values, W = V + 1, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops.blocking import Scratch
from linearize.ops.matmul import product_into


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
        before = carried
        for n, now in enumerate(self.by_chunk):
            torch.add(now, before, out=now)
            self._forget(now, n)
            before = now
        self.last = before

    def _forget(self, x: Tensor, n: int) -> None:
        if self.keep is not None:
            x.mul_(self.keep[:, :, n])

    def read(self, phi_q_PCF: Tensor, y_PCV: Tensor) -> Tensor:
        """phi_q^T S into `y`, and the normaliser phi_q^T z, `[P, C, 1]`."""
        memories = self.memories.flatten(0, 2)
        product_into(y_PCV, phi_q_PCF, memories[:, :-1].mT)
        weighed = self.scratch("weighed", *phi_q_PCF.shape, like=phi_q_PCF)
        return torch.mul(phi_q_PCF, memories[:, -1:], out=weighed).sum(-1, keepdim=True)

    def backward(
        self,
        d_total_PCW: Tensor,
        phi_q_PCF: Tensor,
        d_phi_q: Tensor,
        d_phi_k: Tensor,
        d_v: Tensor,
        d_later: Tensor | None,
    ) -> Tensor:
        """Gradients into `d_phi_q: [b, g, N, C, F]`, `d_phi_k` (set) and `d_v: [b, g, N, C, V]` (added to), those of
        chunks n - 2; returned: that of the carried memory. `d_later`: of the memory after the chunk group."""
        product_into(d_phi_q, d_total_PCW, self.memories.flatten(0, 2))
        d_memories = self.scratch("d_memories", *self.memories.shape, like=phi_q_PCF)
        flat = product_into(d_memories, d_total_PCW.mT, phi_q_PCF).flatten(0, 2)
        by_chunk = d_memories.unbind(2)
        for n in range(len(by_chunk) - 1, -1, -1):
            if d_later is not None:
                torch.add(by_chunk[n], d_later, out=by_chunk[n])
            d_later = by_chunk[n]
            self._forget(d_later, n)
        product_into(d_phi_k, self.value, flat)
        if self.fold is None:
            product_into(d_v, self.phi_k, flat[:, :-1].mT, beta=1)
        else:
            found = product_into(self.scratch("d_folded", *d_v.shape, like=d_v), self.phi_k, flat[:, :-1].mT)
            d_v.addcmul_(found, self.fold)
        return by_chunk[0]
