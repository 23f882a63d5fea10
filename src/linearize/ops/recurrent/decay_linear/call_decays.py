"""Which decays each chunk group of a call gets: factored where they are mild, otherwise those that take any strength.

Letters: B batch, H heads, T tokens, N chunks, C tokens of a chunk, K key dimension, P chunks of a chunk group times its
rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.ops.recurrent.decay_linear.chunk_groups import Cutting, Rows
from linearize.ops.recurrent.decay_linear.decays import MILD, Decays, FactoredDecays, HeadDecays, KeyDecays, factors
from linearize.ops.recurrent.decay_linear.documents import Documents


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
