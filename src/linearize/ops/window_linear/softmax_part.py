"""The softmax part of one query head in each group of a block: scores against tiles, and their gradients.

Exponents are of base 2, which is faster: scores come out of their product times log2(e).

Letters: P chunks of all heads of the block, C chunk, K = J + 2 C keys of a tile, D, V, W = V + 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops.blocking import Scratch
from linearize.ops.matmul import LOG2_E, product_into, whole_products


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
