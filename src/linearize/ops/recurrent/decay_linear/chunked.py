"""The recurrence in time linear in T: attention inside chunks, one state from chunk to chunk, a backward of its own.

It goes group by group, so that what is quadratic in a chunk stays in a processor's cache; the backward keeps the state
before each chunk and computes the rest again. Half precision is widened group by group. The gradient of the log decays
needs no decay matrices: what q_i gains from a log decay, k_j gains too, so d g_t is the sum over i >= t of
q_i . dq_i - k_i . dk_i (2312.06635, appendix C), here summed within the chunk and closed by the state after it, which
holds all the rest.

Letters: B batch, H heads, T tokens, N chunks, C tokens of a chunk, K key dimension, V value dimension, P chunks of a
chunk group times its rows and heads, J these alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize.ops.blocking import alike
from linearize.ops.layout import Layout
from linearize.ops.recurrent.decay_linear.chunk_groups import Cutting, Documents, Rows, documents, masked
from linearize.ops.recurrent.decay_linear.decays import BLOCK, CallDecays
from linearize.ops.recurrent.multi_token import like_decays

CHUNKS = {32: 32}  # tokens of a chunk for heads up to a width; measured: docs/log.md
CHUNK = 64  # for wider ones


def chunked(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, log_decay: Tensor, *, layout: Layout, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same arguments, outputs and values as `reference`; y in the dtype of v, the state at least fp32."""
    tokens, device = q_BHTK.shape[2], q_BHTK.device
    wide = torch.promote_types(v_BHTV.dtype, torch.float32)
    chunk = chunk_size(tokens, max(q_BHTK.shape[3], v_BHTV.shape[3]))
    if (live := layout.live()) is not None:
        k_BHTK = k_BHTK * live[:, None, :, None].to(k_BHTK.dtype)
        log_decay = log_decay.masked_fill(like_decays(~live, log_decay), 0)
    if (starts := layout.starts(tokens, device)) is not None:
        log_decay = log_decay.masked_fill(like_decays(starts, log_decay), 0)
    if state is None:
        state = q_BHTK.new_zeros(*q_BHTK.shape[:2], q_BHTK.shape[3], v_BHTV.shape[3], dtype=wide)
    docs = documents(layout, tokens, chunk, device, wide)
    y, after = _Chunked.apply(q_BHTK, k_BHTK, v_BHTV, log_decay, state.to(wide), docs, chunk)
    return y, after


def chunk_size(tokens: int, width: int) -> int:
    """Tokens of a chunk, a multiple of `BLOCK`, for heads of `width` (the larger of K and V)."""
    chunk = next((size for widest, size in CHUNKS.items() if width <= widest), CHUNK)
    return min(chunk, -(-tokens // BLOCK) * BLOCK)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Call:
    """What the chunk groups of a call share; `dtype`: of the computation."""

    cutting: Cutting
    docs: Documents | None
    decays: CallDecays
    dtype: torch.dtype


class _Chunked(torch.autograd.Function):
    """q, k: `[B, H, T, K]`; v: `[B, H, T, V]`; log decays `[B, H, T]` or with K; state `[B, H, K, V]`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, docs: Documents | None, chunk: int
    ) -> tuple[Tensor, Tensor]:
        cutting = Cutting.of(q, v, chunk)
        call = _Call(cutting=cutting, docs=docs, decays=CallDecays(log_decay, cutting, state.dtype), dtype=state.dtype)
        y, after = torch.empty_like(v), torch.empty_like(state)
        keep = any(ctx.needs_input_grad)
        kept = state.new_empty(*state.shape[:2], cutting.chunks if keep else 0, *state.shape[2:])
        for rows in alike(cutting.rows):
            memory_JKV = rows.of(state).flatten(0, 1)
            for span in alike(cutting.spans):
                if keep:
                    before_JNKV = rows.of(kept)[:, :, span].flatten(0, 1)
                else:
                    before_JNKV = state.new_empty(len(memory_JKV), span.stop - span.start, *state.shape[2:])
                out, memory_JKV = _ChunkGroup(call, rows, span, q, k, v, log_decay).forward(memory_JKV, before_JNKV)
                cutting.put(rows, span, y, out)
            rows.of(after).copy_(memory_JKV.view_as(rows.of(after)))
        ctx.save_for_backward(q, k, v, log_decay, kept, after)
        ctx.call = call
        return y, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, d_after: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, kept, after = ctx.saved_tensors
        call: _Call = ctx.call
        cutting, per_key = call.cutting, inputs[3].dim() == 4
        grads = [torch.empty_like(x) for x in inputs]
        d_state = torch.empty_like(d_after)
        for rows in alike(cutting.rows):
            d_memory_JKV = rows.of(d_after).flatten(0, 1)
            closing = _closing(rows.of(after).flatten(0, 1), d_memory_JKV, per_key)
            for span in alike(cutting.spans, reverse=True):
                (d_y_PCV,) = cutting.cut(rows, span, call.dtype, d_y)
                before_JNKV = rows.of(kept)[:, :, span].flatten(0, 1)
                group = _ChunkGroup(call, rows, span, *inputs)
                parts, d_memory_JKV, closing = group.backward(d_y_PCV, before_JNKV, d_memory_JKV, closing)
                for whole, part in zip(grads, parts, strict=True):
                    cutting.put(rows, span, whole, part)
            rows.of(d_state).copy_(d_memory_JKV.view_as(rows.of(d_state)))
        return *grads, d_state, None, None


class _ChunkGroup:
    """The chunks of some rows, in the dtype of the computation."""

    def __init__(
        self, call: _Call, rows: Rows, span: slice, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor
    ) -> None:
        cutting, heads = call.cutting, rows.heads.stop - rows.heads.start
        self.q, self.k, self.v = cutting.cut(rows, span, call.dtype, q, k, v)
        self.docs = None if call.docs is None else call.docs.part(rows.batch, heads, span)
        self.decays = call.decays.of(cutting, rows, span, log_decay, self.docs)
        self.chunks, self.per_key = span.stop - span.start, log_decay.dim() == 4
        self.through = self.decays.through.unflatten(0, (-1, self.chunks))
        self.reader, self.writer = self.q * self.decays.reading, self.k * self.decays.writing

    def forward(self, memory_JKV: Tensor, before_JNKV: Tensor) -> tuple[Tensor, Tensor]:
        """`y: [P, C, V]` and the state after the last chunk; writes the states before each chunk."""
        y = torch.bmm(self._scores(), self.v)
        writer = self.writer if self.docs is None else masked(self.writer, self.docs.leaves_BNC)
        added = torch.bmm(writer.mT, self.v).unflatten(0, (-1, self.chunks))
        last = _accumulate(added, self.through, memory_JKV, before_JNKV)
        reader = self.reader if self.docs is None else masked(self.reader, self.docs.enters_BNC)
        return y.baddbmm_(reader, self._carried(before_JNKV)), last

    def backward(
        self, d_y: Tensor, before_JNKV: Tensor, d_memory_JKV: Tensor, closing: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Gradients of q, k, v and the log decays, of the state before the chunk group, and `_closing` of that
        state."""
        decays, docs, v = self.decays, self.docs, self.v
        d_read = d_y if docs is None else masked(d_y, docs.enters_BNC)
        added = torch.bmm(self.reader.mT, d_read)
        added = added if decays.scale is None else added.mul_(decays.scale)
        d_after_JNKV = torch.empty_like(before_JNKV)
        d_memory_JKV = _accumulate(added.unflatten(0, (-1, self.chunks)), self.through, d_memory_JKV, d_after_JNKV, -1)
        d_after = d_after_JNKV.flatten(0, 1)
        d_written = torch.bmm(self.writer, d_after)
        d_writer = torch.bmm(v, d_after.mT)
        if docs is not None:
            d_written, d_writer = masked(d_written, docs.leaves_BNC), masked(d_writer, docs.leaves_BNC)
        d_v = d_written.baddbmm_(self._scores().mT, d_y)
        d_reader = torch.bmm(d_read, self._carried(before_JNKV).mT)
        inputs = (self.q, self.k, self.reader, self.writer)
        d_q, d_k = decays.gradients(torch.bmm(d_y, v.mT), inputs, d_reader, d_writer)
        closings = _closing(before_JNKV[:, 1:], d_after_JNKV[:, :-1], self.per_key)
        d_log_decay = self._decay_gradient(
            (self.q * d_q).addcmul_(self.k, d_k, value=-1), torch.cat([closings, closing[:, None]], dim=1)
        )
        return (d_q, d_k, d_v, d_log_decay), d_memory_JKV, _closing(before_JNKV[:, 0], d_memory_JKV, self.per_key)

    def _scores(self) -> Tensor:
        return self.decays.scores(self.q, self.k, self.reader, self.writer)

    def _carried(self, before_JNKV: Tensor) -> Tensor:
        """What the readers find in the states before, `[P, K, V]`."""
        before = before_JNKV.flatten(0, 1)
        return before if self.decays.scale is None else before * self.decays.scale

    def _decay_gradient(self, per_token_PCK: Tensor, closing_JN1: Tensor) -> Tensor:
        """d g_t: the sum of `per_token` from t to the end of its document or chunk, plus `closing` where the chunk's
        end sees t; `[P, C]`, or with K."""
        size, closing = per_token_PCK.shape[1], closing_JN1.flatten(0, 1)[:, None]
        if self.docs is not None:
            per_token = per_token_PCK if self.per_key else per_token_PCK.sum(-1, keepdim=True)
            split = per_token.unflatten(0, (-1, self.chunks))
            later = (self.docs.pair_BNCC.mT @ split).flatten(0, 1)
            later += masked(closing.expand(-1, size, -1), self.docs.leaves_BNC)
            return later if self.per_key else later[..., 0]
        causal = per_token_PCK.new_ones(size, size).tril_()
        if self.per_key:
            return torch.matmul(causal.mT, per_token_PCK).add_(closing)
        return torch.mm(per_token_PCK.sum(-1), causal).add_(closing[..., 0])


def _accumulate(
    added_JNKV: Tensor, through_JN1: Tensor, first_JKV: Tensor, before_JNKV: Tensor, step: Literal[1, -1] = 1
) -> Tensor:
    """S <- through S + added, chunk after chunk in the order of `step`; writes S before each, gives that at the end."""
    added, through, before = (x.unbind(1)[::step] for x in (added_JNKV, through_JN1, before_JNKV))
    before[0].copy_(first_JKV)
    for n, following in alike([*enumerate((*before[1:], torch.empty_like(first_JKV)))]):
        torch.addcmul(added[n], through[n], before[n], out=following)
    return following


def _closing(state_KV: Tensor, d_state_KV: Tensor, per_key: bool) -> Tensor:
    """What a log decay just before a state adds to the loss: `[..., K]`, or `[..., 1]` where there is one per head."""
    per_row = (state_KV * d_state_KV).sum(-1)
    return per_row if per_key else per_row.sum(-1, keepdim=True)
