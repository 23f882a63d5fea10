"""Chunks of the gated delta rule by products of matrices (2412.06464, section 3.3; the UT form of 2406.06484).

With S the state before a chunk, delta_i = beta_i (v_i - S_i^T k_i) what token i writes along k_i, and decays as in
`Decays`,
    (1 + A) delta = beta (v - carried k S),  A_ij = beta_i pair_ij k_i . k_j  for j < i,
    y = carried q S + P delta,               P_ij = pair_ij q_i . k_j         for j <= i,
    S <- kept S + (written k)^T delta.
Only two products go from chunk to chunk: delta = U - W S with (1 + A) [U, W] = beta [v, carried k], and the last line.
The backward pass runs these two in reverse and computes again what is quadratic in the chunk. All of it goes slab by
slab, so that the matrices of a slab stay in the processor's cache.

Letters: R rows (batch times heads), N chunks, C tokens of a chunk, K key dimension, V value dimension, P = chunks of a
slab times R.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize.ops.products import decay_factors_

SLAB = 1 << 17  # numbers per matrix of a slab
SOLVE = 16  # rows of the systems that are solved row by row


def delta_chunks(
    q_NRCK: Tensor,
    k_NRCK: Tensor,
    v_NRCV: Tensor,
    beta_NRC: Tensor,
    total_NRC: Tensor,
    document_NRC: Tensor | None,
    memory_RKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """`y: [N, R, C, V]` and the state `[R, K, V]` after the last chunk.

    `total_NRC`: sums of the log decays since each chunk's start, fp64. `document_NRC`: how many documents have opened
    since (None: none has).
    """
    y, after = _DeltaChunks.apply(q_NRCK, k_NRCK, v_NRCV, beta_NRC, total_NRC, document_NRC, memory_RKV)
    return y, after


@dataclass(frozen=True, eq=False)
class Decays:
    """What is left of something written when it is read, all at most 1.

    `pair: [P, C, C]`: of token j at token i, 0 unless j <= i in one document. `carried: [P, C, 1]`: of the state before
    the chunk, at each token. `written: [P, C, 1]`: of each token, at the chunk's end. `kept: [P, 1, 1]`: of the state
    before the chunk, at its end.
    """

    pair: Tensor
    carried: Tensor
    written: Tensor
    kept: Tensor


def decays(total_PC: Tensor, document_PC: Tensor | None, dtype: torch.dtype) -> Decays:
    """The decays of some chunks, in `dtype`."""
    column, row = total_PC[:, :, None], total_PC[:, None]
    pair = decay_factors_((column - row).to(dtype)).tril_()
    carried, written = decay_factors_(column.to(dtype, copy=True)), decay_factors_((column[:, -1:] - column).to(dtype))
    kept = carried[:, -1:]
    if document_PC is not None:
        own = document_PC[:, :, None]
        pair = pair * (own == document_PC[:, None])
        carried, written, kept = carried * (own == 0), written * (own == own[:, -1:]), kept * (own[:, -1:] == 0)
    return Decays(pair, carried, written, kept)


def unit_inverse(lower_PCC: Tensor, out: Tensor) -> None:
    """(1 + A)^-1 with A the part of the matrix below its diagonal, by halves."""
    size = lower_PCC.shape[-1]
    if size <= SOLVE:
        eye = torch.eye(size, dtype=lower_PCC.dtype, device=lower_PCC.device).expand_as(lower_PCC)
        out.copy_(torch.linalg.solve_triangular(lower_PCC, eye, upper=False, unitriangular=True))
        return
    half = size // 2
    first, second, corner = out[:, :half, :half], out[:, half:, half:], lower_PCC[:, half:, :half]
    unit_inverse(lower_PCC[:, :half, :half], first)
    unit_inverse(lower_PCC[:, half:, half:], second)
    out[:, half:, :half] = -(second @ (corner @ first))
    out[:, :half, half:] = 0


def _slabs(k_NRCK: Tensor) -> list[slice]:
    """Which chunks are computed together."""
    chunks, rows, tokens, width = k_NRCK.shape
    step = max(1, SLAB // (rows * tokens * max(tokens, width)))
    return [slice(n, min(n + step, chunks)) for n in range(0, chunks, step)]


def _parts(slab: slice, *tensors: Tensor | None) -> Iterator[Any]:
    """The chunks of a slab, `[N, R, ...] -> [P, ...]`."""
    return (None if x is None else x[slab].flatten(0, 1) for x in tensors)


class _DeltaChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_NRCK: Tensor,
        k_NRCK: Tensor,
        v_NRCV: Tensor,
        beta_NRC: Tensor,
        total_NRC: Tensor,
        document_NRC: Tensor | None,
        memory: Tensor,
    ) -> tuple[Tensor, Tensor]:
        chunks, rows, tokens, _ = k_NRCK.shape
        y, deltas, reads = torch.empty_like(v_NRCV), torch.empty_like(v_NRCV), torch.empty_like(k_NRCK)
        memories, inverses = v_NRCV.new_empty(chunks, *memory.shape), k_NRCK.new_empty(chunks, rows, tokens, tokens)
        for slab in _slabs(k_NRCK):
            q, k, v, beta, total, document = _parts(slab, q_NRCK, k_NRCK, v_NRCV, beta_NRC, total_NRC, document_NRC)
            here, strong = decays(total, document, k.dtype), k * beta[..., None]
            inverse, delta, read, held, out = _parts(slab, inverses, deltas, reads, memories, y)
            unit_inverse((strong @ k.mT).mul_(here.pair), inverse)
            torch.bmm(inverse, v * beta[..., None], out=delta)
            torch.bmm(inverse, strong.mul_(here.carried), out=read)
            writing, kept = (x.unflatten(0, (-1, rows)) for x in (k * here.written, here.kept))
            for n in range(slab.start, slab.stop):
                memories[n] = memory
                deltas[n].baddbmm_(reads[n], memory, alpha=-1)
                memory = torch.baddbmm(kept[n - slab.start] * memory, writing[n - slab.start].mT, deltas[n])
            torch.bmm(q * here.carried, held, out=out).baddbmm_((q @ k.mT).mul_(here.pair), delta)
        ctx.save_for_backward(
            q_NRCK, k_NRCK, v_NRCV, beta_NRC, total_NRC, document_NRC, memories, deltas, reads, inverses
        )
        return y, memory

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_y, d_memory = grads[0].contiguous(), grads[1]
        d_q, d_k, d_v, d_beta, d_total = (torch.empty_like(x) for x in ctx.saved_tensors[:5])
        for slab in reversed(_slabs(ctx.saved_tensors[1])):
            out = _parts(slab, d_q, d_k, d_v, d_beta, d_total)
            d_memory = _backward_slab(slab, ctx.saved_tensors, d_y, d_memory, *out)
        return d_q, d_k, d_v, d_beta, d_total, None, d_memory


def _backward_slab(
    slab: slice,
    saved: tuple[Tensor, ...],
    d_y_NRCV: Tensor,
    d_memory: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    d_beta: Tensor,
    d_total: Tensor,
) -> Tensor:
    """Writes the gradients of a slab; gives that of the state before it from `d_memory`, that of the state after it."""
    rows = d_y_NRCV.shape[1]
    q, k, v, beta, total, document, held, delta, read, inverse = _parts(slab, *saved)
    d_y, column = next(_parts(slab, d_y_NRCV)), beta[..., None]
    here, strong = decays(total, document, k.dtype), k * column
    d_delta, d_held = (q @ k.mT).mul_(here.pair).mT @ d_y, (q * here.carried).mT @ d_y
    writing, reading, kept, d_states, d_deltas = (
        x.unflatten(0, (-1, rows)) for x in (k * here.written, read, here.kept, d_held, d_delta)
    )
    after, d_memory = _backward_states(writing, reading, kept, d_states, d_deltas, d_memory)
    torch.bmm(inverse.mT, d_delta, out=d_v)  # of beta (v - carried k S), until it is multiplied by beta
    d_p, d_a = (d_y @ delta.mT).mul_(here.pair), (d_v @ delta.mT).mul_(here.pair).tril_(-1).neg_()
    d_writing = (delta @ after.mT).mul_(here.written)
    # q and beta k enter as readers, at exp(total); k as what is read, at exp(-total)
    torch.bmm(d_y, held.mT, out=d_q).mul_(here.carried).baddbmm_(d_p, k)
    d_strong = (d_v @ held.mT).mul_(-here.carried).baddbmm_(d_a, k)
    torch.baddbmm(d_writing, d_p.mT, q, out=d_k).baddbmm_(d_a.mT, strong)
    torch.add((d_strong * k).sum(-1), (d_v * v).sum(-1), out=d_beta)
    d_total.copy_((d_q * q).add_(d_strong * strong).sub_(d_k * k).sum(-1))
    d_total[:, -1] += (d_writing * k).sum((-2, -1)) + here.kept[:, 0, 0] * (after * held).sum((-2, -1))
    d_k.addcmul_(d_strong, column)
    d_v.mul_(column)
    return d_memory


def _backward_states(
    writing_NRCK: Tensor,
    read_NRCK: Tensor,
    kept_NR11: Tensor,
    d_held_NRKV: Tensor,
    d_delta_NRCV: Tensor,
    d_memory: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the states after each chunk, `[P, K, V]`, and before the first; adds theirs to `d_delta_NRCV`."""
    after = torch.empty_like(d_held_NRKV)
    for n in range(after.shape[0] - 1, -1, -1):
        after[n] = d_memory
        d_delta_NRCV[n].baddbmm_(writing_NRCK[n], d_memory)
        d_memory = torch.addcmul(d_held_NRKV[n], kept_NR11[n], d_memory)
        d_memory.baddbmm_(read_NRCK[n].mT, d_delta_NRCV[n], alpha=-1)
    return after.flatten(0, 1), d_memory
