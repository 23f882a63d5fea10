"""Decays of some chunks and the scores of the tokens inside a chunk, in the cheapest form that is exact.

`FactoredDecays` scales q and k by their decays from and to the chunk's end, which leaves a product and a triangle; for
chunks that keep at least e^MILD of what they begin with. `HeadDecays` and `KeyDecays` take any decays: a matrix of
decays between tokens, or blocks of `BLOCK` tokens scaled in fp64, with each log decay cut at -40 (e^-40 is below its
rounding). Sums of log decays are fp64, so that differences stay exact; factors below e^UNDERFLOW are 0.

`CallDecays` picks them for each chunk group of a call.

Letters: B batch, H heads, T tokens, N chunks, P chunks times rows and heads, C tokens of a chunk, K key dimension, V
value dimension, J blocks of R tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.ops.matmul import decay_factors_
from linearize.ops.recurrent.decay_linear.chunk_groups import Cutting, Documents, Rows, masked

BLOCK = 16
LOWEST = -40.0  # of a log decay per dimension
MILD = -60.0  # e^60 times any score and e^-60 times any key are ordinary numbers of fp32


class Decays(ABC):
    """What stands between the tokens of some chunks and the states before and after them, `[P, C, 1 or K]` each.

    A token reads the state before its chunk, times `scale: [P, 1 or K, 1]` (None: as it is), with q times `reading`; it
    writes into the state after it with k times `writing`. `through: [P, 1 or K, 1]` is what remains of the state before
    in the one after.
    """

    reading: Tensor
    writing: Tensor
    through: Tensor
    scale: Tensor | None
    docs: Documents | None

    @abstractmethod
    def scores(self, q_PCK: Tensor, k_PCK: Tensor, reader_PCK: Tensor, writer_PCK: Tensor) -> Tensor:
        """q_i^T exp(g_i + ... + g_{j+1}) k_j for the pairs that see each other, 0 for others: `[P, C, C]`.

        `reader`, `writer`: q times `reading`, k times `writing`.
        """

    @abstractmethod
    def gradients(
        self, d_scores: Tensor, inputs: tuple[Tensor, Tensor, Tensor, Tensor], d_reader: Tensor, d_writer: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of q and k; all but `inputs` is overwritten.

        `inputs`: what `scores` took. `d_reader`, `d_writer`: gradients of the reads and writes of the states.
        """

    def _seen(self, scores_PCC: Tensor) -> Tensor:
        """0 for the pairs that do not see each other, whatever was there beyond the triangle."""
        scores_PCC = scores_PCC.tril_()
        return scores_PCC if self.docs is None else masked(scores_PCC, self.docs.pair_BNCC)


class FactoredDecays(Decays):
    """Decays per head or per key dimension that are mild over a chunk: exp(t_i - t_j) = exp(t_i - e) exp(e - t_j)."""

    def __init__(self, reading: Tensor, writing: Tensor, through: Tensor, docs: Documents | None) -> None:
        self.reading, self.writing, self.scale, self.docs = reading, writing, through, docs
        self.through = through if docs is None else masked(through, docs.passes_BN)

    @staticmethod
    def of(total_PCK: Tensor, dtype: torch.dtype, docs: Documents | None) -> FactoredDecays:
        """From sums of log decays since the chunk's start, fp64."""
        return FactoredDecays(*factors(total_PCK, dtype), docs)

    def scores(self, q_PCK: Tensor, k_PCK: Tensor, reader_PCK: Tensor, writer_PCK: Tensor) -> Tensor:
        """The product of reader and writer; what overflows lies beyond the triangle."""
        return self._seen(torch.bmm(reader_PCK, writer_PCK.mT))

    def gradients(
        self, d_scores: Tensor, inputs: tuple[Tensor, Tensor, Tensor, Tensor], d_reader: Tensor, d_writer: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Decays`."""
        d, (_, _, reader, writer) = self._seen(d_scores), inputs
        d_q, d_k = d_reader.baddbmm_(d, writer), d_writer.baddbmm_(d.mT, reader)
        return d_q.mul_(self.reading), d_k.mul_(self.writing)


def factors(total_CK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`reading`, `writing` and `through` of `FactoredDecays`, `[..., C, K]` twice and `[..., K, 1]`."""
    end = total_CK[..., -1:, :]
    reading = (total_CK - end).exp_().to(dtype)
    return reading, reading.reciprocal(), end.exp().to(dtype).mT


class AnyDecays(Decays):
    """Decays of any strength, whose scores do not go through reader and writer."""

    scale = None

    @abstractmethod
    def scores_backward(self, d_scores: Tensor, q_PCK: Tensor, k_PCK: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of q and k through the scores alone."""

    def gradients(
        self, d_scores: Tensor, inputs: tuple[Tensor, Tensor, Tensor, Tensor], d_reader: Tensor, d_writer: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Decays`."""
        d_q, d_k = self.scores_backward(self._seen(d_scores), *inputs[:2])
        return d_q.addcmul_(d_reader, self.reading), d_k.addcmul_(d_writer, self.writing)

    def _mask(self, docs: Documents | None) -> None:
        self.docs = docs
        if docs is not None:
            self.through = masked(self.through, docs.passes_BN)


class HeadDecays(AnyDecays):
    """One decay per head and token (SSD, 2405.21060; retention, 2307.08621)."""

    def __init__(self, total_PC1: Tensor, dtype: torch.dtype, docs: Documents | None) -> None:
        self.reading = decay_factors_(total_PC1.to(dtype, copy=True))
        self.writing = decay_factors_((total_PC1[:, -1:] - total_PC1).to(dtype))
        self.through = self.reading[:, -1:]
        self.between = decay_factors_((total_PC1 - total_PC1.mT).to(dtype))
        self._mask(docs)

    def scores(self, q_PCK: Tensor, k_PCK: Tensor, reader_PCK: Tensor, writer_PCK: Tensor) -> Tensor:
        """(q k^T) times the decay matrix."""
        return self._seen((q_PCK @ k_PCK.mT).mul_(self.between))

    def scores_backward(self, d_scores: Tensor, q_PCK: Tensor, k_PCK: Tensor) -> tuple[Tensor, Tensor]:
        """See `AnyDecays`."""
        d = d_scores.mul_(self.between)
        return d @ k_PCK, d.mT @ q_PCK


class KeyDecays(AnyDecays):
    """One decay per key dimension and token (gated linear attention, 2312.06635, section 4.3)."""

    def __init__(self, log_decay_PCK: Tensor, docs: Documents | None) -> None:
        dtype = log_decay_PCK.dtype
        blocks = log_decay_PCK.clamp(min=LOWEST).unflatten(1, (-1, BLOCK))
        self.inside = blocks.cumsum(2, dtype=torch.float64)
        self.total = self.inside[:, :, -1:]
        self.from_start = decay_factors_(self.inside.to(dtype, copy=True))
        self.to_end = decay_factors_((self.total - self.inside).to(dtype))
        self.upto = self.total.cumsum(1)
        upto, whole = self.upto, self.upto[:, -1:]
        self.reading = decay_factors_((upto - self.total + self.inside).to(dtype)).flatten(1, 2)
        self.writing = decay_factors_((whole - upto + self.total - self.inside).to(dtype)).flatten(1, 2)
        self.through = decay_factors_(whole[:, 0, 0, :, None].to(dtype, copy=True))
        self._mask(docs)

    @cached_property
    def from_middle(self) -> Tensor:
        """exp of the log decays from the middle of a block to each of its tokens, fp64, at most e^320."""
        return (self.inside - self.total / 2).exp()

    def _gaps(self, block: int) -> Tensor:
        """Decay between the end of each earlier block and the start of this one, `[P, block, 1, K]`."""
        start = self.upto[:, block - 1 : block]
        return decay_factors_((start - self.upto[:, :block]).to(self.from_start.dtype))

    def scores(self, q_PCK: Tensor, k_PCK: Tensor, reader_PCK: Tensor, writer_PCK: Tensor) -> Tensor:
        """Block by block; a block and those before it meet at the block's start."""
        q, k = (x.unflatten(1, (-1, BLOCK)) for x in (q_PCK, k_PCK))
        scaled_q, scaled_k = q * self.from_start, k * self.to_end
        scores = q.new_zeros(*q_PCK.shape[:2], q_PCK.shape[1])
        within = torch.tril((q * self.from_middle) @ (k / self.from_middle).mT)
        within = within.where(within.abs() > _smallest(q.dtype), 0).to(q.dtype)
        for j in range(q.shape[1]):
            rows = slice(j * BLOCK, (j + 1) * BLOCK)
            scores[:, rows, rows] = within[:, j]
            if j:
                earlier = (scaled_k[:, :j] * self._gaps(j)).flatten(1, 2)
                scores[:, rows, : j * BLOCK] = scaled_q[:, j] @ earlier.mT
        return self._seen(scores)

    def scores_backward(self, d_scores: Tensor, q_PCK: Tensor, k_PCK: Tensor) -> tuple[Tensor, Tensor]:
        """See `AnyDecays`."""
        q, k = (x.unflatten(1, (-1, BLOCK)) for x in (q_PCK, k_PCK))
        scaled_q, scaled_k = q * self.from_start, k * self.to_end
        spans = [slice(j * BLOCK, (j + 1) * BLOCK) for j in range(q.shape[1])]
        d_within = torch.stack([d_scores[:, rows, rows] for rows in spans], dim=1).double()
        d_q = (self.from_middle * (d_within @ (k / self.from_middle))).to(q.dtype)
        d_k = ((d_within.mT @ (q * self.from_middle)) / self.from_middle).to(q.dtype)
        for j, rows in enumerate(spans[1:], start=1):
            gaps, d_block = self._gaps(j), d_scores[:, rows, : j * BLOCK]
            earlier = (scaled_k[:, :j] * gaps).flatten(1, 2)
            d_q[:, j] += self.from_start[:, j] * (d_block @ earlier)
            d_earlier = (d_block.mT @ scaled_q[:, j]).unflatten(1, (j, BLOCK))
            d_k[:, :j] += d_earlier * gaps * self.to_end[:, :j]
        return d_q.flatten(1, 2), d_k.flatten(1, 2)


def _smallest(dtype: torch.dtype) -> float:
    """Below it numbers are subnormal in `dtype`."""
    return torch.finfo(dtype).tiny


class CallDecays:
    """Decays per head are made once for a call, those per key dimension group by group.

    Only on a processor is it known for nothing whether decays are mild; elsewhere any are taken.
    """

    def __init__(self, log_decay: Tensor, cutting: Cutting, dtype: torch.dtype) -> None:
        """`log_decay: [B, H, T]` or `[B, H, T, K]`."""
        self.dtype, self.per_key = dtype, log_decay.dim() == 4
        self.known = log_decay.device.type == "cpu" and not torch.compiler.is_compiling()
        if self.per_key:
            return
        padded = F.pad(log_decay, (0, cutting.chunks * cutting.chunk - cutting.tokens))
        self.total = padded.unflatten(2, (-1, cutting.chunk)).cumsum(3, dtype=torch.float64)[..., None]
        self.mild = torch.zeros(self.total.shape[:3], dtype=torch.bool)
        if self.known:
            self.mild = self.total[..., -1, 0] > MILD
            self.factors = factors(self.total, dtype)

    def of(self, cutting: Cutting, rows: Rows, span: slice, log_decay: Tensor, docs: Documents | None) -> Decays:
        """Those of a chunk group."""
        if self.per_key:
            return self._per_key(next(cutting.cut(rows, span, self.dtype, log_decay)), docs)
        at = (rows.batch, rows.heads, span)
        if self.known and bool(self.mild[at].all()):
            reading, writing, through = (x[at].flatten(0, 2) for x in self.factors)
            return FactoredDecays(reading, writing, through, docs)
        return HeadDecays(self.total[at].flatten(0, 2), self.dtype, docs)

    def _per_key(self, log_decay_PCK: Tensor, docs: Documents | None) -> Decays:
        if self.known:
            total = log_decay_PCK.cumsum(1, dtype=torch.float64)
            if float(total[:, -1].amin()) > MILD:
                return FactoredDecays.of(total, self.dtype, docs)
        return KeyDecays(log_decay_PCK, docs)
