"""What differs between a decay per head and a decay per key dimension: the scores of the tokens inside a chunk.

Every exponential is of a sum of log decays between two tokens, except inside blocks of `BLOCK` tokens with decays per
dimension: there q and k are scaled from the middle of the block, in fp64, with each log decay cut at -40 (e^-40 is
below its rounding).

Letters: B batch, H heads, N chunks, C tokens of a chunk, K key dimension, J blocks of R tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from linearize.ops.decay_linear.documents import Documents
from linearize.ops.products import decay_factors_

BLOCK = 16
LOWEST = -40.0  # of a log decay per dimension


class Decays(ABC):
    """Decays of one call, `[B, H, N, C, 1 or K]` each.

    `enter`: from the chunk's start to a token, that token's own included. `leave`: from a token to the chunk's end.
    `through: [B, H, N, 1 or K, 1]`: over the whole chunk. All are 0 where a document ends in between.
    """

    enter: Tensor
    leave: Tensor
    through: Tensor

    @abstractmethod
    def scores(self, q_BHNCK: Tensor, k_BHNCK: Tensor) -> Tensor:
        """q_i^T exp(g_i + ... + g_{j+1}) k_j for the pairs that see each other, 0 for others: `[B, H, N, C, C]`."""

    @abstractmethod
    def scores_backward(self, d_scores: Tensor, q_BHNCK: Tensor, k_BHNCK: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of q and k from that of the scores."""

    def _mask(self, docs: Documents) -> None:
        if docs.enters_BNC is not None and docs.leaves_BNC is not None and docs.passes_BN is not None:
            self.enter = self.enter * docs.enters_BNC[:, None, :, :, None]
            self.leave = self.leave * docs.leaves_BNC[:, None, :, :, None]
            self.through = self.through * docs.passes_BN[:, None, :, None, None]


class HeadDecays(Decays):
    """One decay per head and token (SSD, 2405.21060; retention, 2307.08621)."""

    def __init__(self, log_decay_BHNC: Tensor, docs: Documents) -> None:
        total = log_decay_BHNC.cumsum(-1, dtype=torch.float64)
        dtype = log_decay_BHNC.dtype
        self.enter = decay_factors_(total.to(dtype, copy=True))[..., None]
        self.leave = decay_factors_((total[..., -1:] - total).to(dtype))[..., None]
        self.through = self.enter[..., -1:, :]
        between = decay_factors_((total[..., :, None] - total[..., None, :]).to(dtype))
        self.between = between.mul_(docs.pair_BNCC[:, None])
        self._mask(docs)

    def scores(self, q_BHNCK: Tensor, k_BHNCK: Tensor) -> Tensor:
        """(q k^T) times the decay matrix."""
        return (q_BHNCK @ k_BHNCK.mT).mul_(self.between)

    def scores_backward(self, d_scores: Tensor, q_BHNCK: Tensor, k_BHNCK: Tensor) -> tuple[Tensor, Tensor]:
        """See `Decays`."""
        d = d_scores * self.between
        return d @ k_BHNCK, d.mT @ q_BHNCK


class KeyDecays(Decays):
    """One decay per key dimension and token (gated linear attention, 2312.06635, section 4.3)."""

    def __init__(self, log_decay_BHNCK: Tensor, docs: Documents) -> None:
        self.docs, dtype = docs, log_decay_BHNCK.dtype
        blocks = log_decay_BHNCK.clamp(min=LOWEST).unflatten(3, (-1, BLOCK))
        self.inside = blocks.cumsum(4, dtype=torch.float64)
        self.total = self.inside[..., -1:, :]
        self.from_start = self.inside.to(dtype).exp()
        self.to_end = (self.total - self.inside).to(dtype).exp()
        upto = self.total.cumsum(3)
        self.upto, whole = upto, upto[:, :, :, -1:]
        self.enter = (self.from_start * (upto - self.total).to(dtype).exp()).flatten(3, 4)
        self.leave = (self.to_end * (whole - upto).to(dtype).exp()).flatten(3, 4)
        self.through = whole[:, :, :, 0, 0, :, None].to(dtype).exp()
        self._mask(docs)

    @cached_property
    def from_middle(self) -> Tensor:
        """exp of the log decays from the middle of a block to each of its tokens, fp64, at most e^320."""
        return (self.inside - self.total / 2).exp()

    def _gaps(self, block: int) -> Tensor:
        """Decay between the end of each earlier block and the start of this one, `[B, H, N, block, 1, K]`."""
        start = self.upto[:, :, :, block - 1 : block]
        return (start - self.upto[:, :, :, :block]).to(self.from_start.dtype).exp()

    def scores(self, q_BHNCK: Tensor, k_BHNCK: Tensor) -> Tensor:
        """Block by block; a block and those before it meet at the block's start."""
        q, k = (x.unflatten(3, (-1, BLOCK)) for x in (q_BHNCK, k_BHNCK))
        scaled_q, scaled_k = q * self.from_start, k * self.to_end
        scores = q.new_zeros(*q_BHNCK.shape[:-1], q_BHNCK.shape[3])
        within = (q * self.from_middle) @ (k / self.from_middle).mT
        within = within.masked_fill_(~_causal(q), 0).to(q.dtype)
        for j in range(q.shape[3]):
            rows = slice(j * BLOCK, (j + 1) * BLOCK)
            scores[..., rows, rows] = within[:, :, :, j]
            if j:
                earlier = (scaled_k[:, :, :, :j] * self._gaps(j)).flatten(3, 4)
                scores[..., rows, : j * BLOCK] = scaled_q[:, :, :, j] @ earlier.mT
        return scores.masked_fill_(~self.docs.pair_BNCC[:, None], 0)

    def scores_backward(self, d_scores: Tensor, q_BHNCK: Tensor, k_BHNCK: Tensor) -> tuple[Tensor, Tensor]:
        """See `Decays`."""
        q, k = (x.unflatten(3, (-1, BLOCK)) for x in (q_BHNCK, k_BHNCK))
        scaled_q, scaled_k = q * self.from_start, k * self.to_end
        d = d_scores.masked_fill(~self.docs.pair_BNCC[:, None], 0)
        spans = [slice(j * BLOCK, (j + 1) * BLOCK) for j in range(q.shape[3])]
        d_within = torch.stack([d[..., rows, rows] for rows in spans], dim=3).double()
        d_q = (self.from_middle * (d_within @ (k / self.from_middle))).to(q.dtype)
        d_k = ((d_within.mT @ (q * self.from_middle)) / self.from_middle).to(q.dtype)
        for j, rows in enumerate(spans[1:], start=1):
            gaps, d_block = self._gaps(j), d[..., rows, : j * BLOCK]
            earlier = (scaled_k[:, :, :, :j] * gaps).flatten(3, 4)
            d_q[:, :, :, j] += self.from_start[:, :, :, j] * (d_block @ earlier)
            d_earlier = (d_block.mT @ scaled_q[:, :, :, j]).unflatten(3, (j, BLOCK))
            d_k[:, :, :, :j] += d_earlier * gaps * self.to_end[:, :, :, :j]
        return d_q.flatten(3, 4), d_k.flatten(3, 4)


def _causal(x_BHNJRK: Tensor) -> Tensor:
    return torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=x_BHNJRK.device).tril()


def make_decays(log_decay: Tensor, docs: Documents) -> Decays:
    """`log_decay: [B, H, N, C]` or `[B, H, N, C, K]`."""
    return HeadDecays(log_decay, docs) if log_decay.dim() == 4 else KeyDecays(log_decay, docs)
