"""The gated delta rule in chunks, linear in T, by products of matrices (2412.06464, section 3.3; the UT form of
2406.06484). The sequence is cut, documents and padding become decays.

With S the state before a chunk, delta_i = beta_i (v_i - S_i^T k_i) what token i writes along k_i, and decays as in
`Decays`,
    (1 + A) delta = beta (v - carried k S),  A_ij = beta_i pair_ij k_i . k_j  for j < i,
    y = carried q S + P delta,               P_ij = pair_ij q_i . k_j         for j <= i,
    S <- kept S + (written k)^T delta.
Only two products go from chunk to chunk: delta = U - W S with (1 + A) [U, W] = beta [v, carried k], and the last line.
The backward pass runs these two in reverse and computes again what is quadratic in the chunk. All of it goes chunk
group by chunk group, so that the matrices of a chunk group stay in the processor's cache.

Letters: B batch, H heads, T tokens, R rows (batch times heads), N chunks, C tokens of a chunk, K key dimension, V value
dimension, P = chunks of a chunk group times R.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from linearize.ops.blocking import alike
from linearize.ops.layout import Layout
from linearize.ops.matmul import decay_factors_

CHUNK = 32  # measured for heads of 16 and 64: docs/log.md
SMALLEST = -1000.0  # exp of less is 0 in fp64 too, and so is its gradient
GROUP_NUMBERS = 200_000  # per matrix of a chunk group: under 1 MiB, beyond which allocators give fresh memory
SOLVE = 16  # rows of the systems that are solved row by row


def chunked(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    log_decay_BHT: Tensor,
    beta_BHT: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same arguments, outputs and values as `reference`; cannot be differentiated twice."""
    (batch, heads, tokens, key_dim), value_dim = k_BHTK.shape, v_BHTV.shape[-1]
    opens, live = layout.starts(tokens, k_BHTK.device), layout.live()
    log_decay = log_decay_BHT.clamp(min=SMALLEST)
    if opens is not None:
        log_decay = log_decay.masked_fill(opens[:, None], 0)
    if live is not None:
        log_decay, beta_BHT = (x.masked_fill(~live[:, None], 0) for x in (log_decay, beta_BHT))
    chunk = min(CHUNK, tokens)
    # fp64: differences stay exact next to a strong decay
    total = _by_chunk(log_decay.to(torch.float64), chunk).cumsum(-1)
    document = None if opens is None else _by_chunk(opens[:, None].expand(batch, heads, -1), chunk).cumsum(-1)
    wide = torch.promote_types(v_BHTV.dtype, torch.float32)
    if state is None:
        state = v_BHTV.new_zeros(batch, heads, key_dim, value_dim, dtype=wide)
    memory = state.to(wide).flatten(0, 1).contiguous()
    y, after = delta_chunks(q_BHTK, k_BHTK, v_BHTV, beta_BHT, total, document, memory)
    return y, after.unflatten(0, (batch, heads))


def _by_chunk(x_BHT: Tensor, chunk: int) -> Tensor:
    """`[B, H, T] -> [N, R, C]`; what is missing in the last chunk is filled with zeros."""
    if missing := -x_BHT.shape[2] % chunk:
        x_BHT = F.pad(x_BHT, (0, missing))
    return x_BHT.unflatten(2, (-1, chunk)).movedim(2, 0).flatten(1, 2).contiguous()


def delta_chunks(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    beta_BHT: Tensor,
    total_NRC: Tensor,
    document_NRC: Tensor | None,
    memory_RKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """`y: [B, H, T, V]` in the dtype of v, and the state `[R, K, V]` after the last chunk, in that of the state before.

    `total_NRC`: sums of the log decays since each chunk's start, fp64. `document_NRC`: how many documents have opened
    since (None: none has).
    """
    y, after = _DeltaChunks.apply(q_BHTK, k_BHTK, v_BHTV, beta_BHT, total_NRC, document_NRC, memory_RKV)
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


def _groups(total_NRC: Tensor, width: int) -> list[slice]:
    """Which chunks are computed together."""
    chunks, rows, tokens = total_NRC.shape
    step = max(1, GROUP_NUMBERS // (rows * tokens * max(tokens, width)))
    return [slice(n, min(n + step, chunks)) for n in range(0, chunks, step)]


def _parts(group: slice, *tensors: Tensor | None) -> Iterator[Any]:
    """The chunks of a chunk group, `[N, R, ...] -> [P, ...]`."""
    return (None if x is None else x[group].flatten(0, 1) for x in tensors)


def _cut(group: slice, chunk: int, dtype: torch.dtype, *tensors: Tensor) -> Iterator[Tensor]:
    """The chunks of a chunk group, `[B, H, T, ...] -> [P, C, ...]` in `dtype`; zeros after the last token."""
    for x in tensors:
        part = x[:, :, group.start * chunk : group.stop * chunk]
        if missing := (group.stop - group.start) * chunk - part.shape[2]:
            part = F.pad(part, (0, 0) * (part.dim() - 3) + (0, missing))
        yield part.to(dtype).unflatten(2, (-1, chunk)).movedim(2, 0).flatten(0, 2)


def _put(group: slice, out_BHT: Tensor, value_PC: Tensor) -> None:
    """Write the chunks of a chunk group where `_cut` took them."""
    chunk = value_PC.shape[1]
    place = out_BHT[:, :, group.start * chunk : group.stop * chunk]
    value = value_PC.unflatten(0, (-1, *place.shape[:2])).movedim(0, 2).flatten(2, 3)
    place.copy_(value[:, :, : place.shape[2]])


class _DeltaChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BHTK: Tensor,
        k_BHTK: Tensor,
        v_BHTV: Tensor,
        beta_BHT: Tensor,
        total_NRC: Tensor,
        document_NRC: Tensor | None,
        memory: Tensor,
    ) -> tuple[Tensor, Tensor]:
        (chunks, rows, tokens), (key, value) = total_NRC.shape, memory.shape[1:]
        y, keep, wide = torch.empty_like(v_BHTV), any(ctx.needs_input_grad), memory.dtype
        groups = _groups(total_NRC, max(key, value))
        kept = [
            memory.new_empty(chunks if keep else groups[0].stop, rows, *size) for size in _sizes(tokens, key, value)
        ]
        for group in alike(groups):
            q, k, v, beta = _cut(group, tokens, wide, q_BHTK, k_BHTK, v_BHTV, beta_BHT)
            total, document = _parts(group, total_NRC, document_NRC)
            here, strong = decays(total, document, wide), k * beta[..., None]
            memories, deltas, reads, inverses = (x[group] if keep else x[: group.stop - group.start] for x in kept)
            states, delta, read, inverse = (x.flatten(0, 1) for x in (memories, deltas, reads, inverses))
            unit_inverse((strong @ k.mT).mul_(here.pair), inverse)
            torch.bmm(inverse, v * beta[..., None], out=delta)
            torch.bmm(inverse, strong.mul_(here.carried), out=read)
            writing, remaining = (x.unflatten(0, (-1, rows)).unbind(0) for x in (k * here.written, here.kept))
            for n, before, written in alike([*zip(count(), memories.unbind(0), deltas.unbind(0), strict=False)]):
                before.copy_(memory)
                written.baddbmm_(reads[n], memory, alpha=-1)
                memory = torch.baddbmm(remaining[n] * memory, writing[n].mT, written)
            out = torch.bmm(q * here.carried, states).baddbmm_((q @ k.mT).mul_(here.pair), delta)
            _put(group, y, out)
        ctx.save_for_backward(q_BHTK, k_BHTK, v_BHTV, beta_BHT, total_NRC, document_NRC, *kept)
        return y, memory

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, total, document, memories, deltas, reads, inverses = ctx.saved_tensors
        d_y, d_memory = grads
        outputs, d_total = [torch.empty_like(x) for x in tensors], torch.empty_like(total)
        for group in alike(_groups(total, max(memories.shape[2:])), reverse=True):
            inputs = _cut(group, total.shape[2], memories.dtype, *tensors, d_y)
            kept = _parts(group, total, document, memories, deltas, reads, inverses)
            *d_inputs, d_total_PC, d_memory = _backward_group(total.shape[1], tuple(inputs), tuple(kept), d_memory)
            for out, value in zip(outputs, d_inputs, strict=True):
                _put(group, out, value)
            next(_parts(group, d_total)).copy_(d_total_PC)
        return *outputs, d_total, None, d_memory


def _sizes(tokens: int, key: int, value: int) -> tuple[tuple[int, int], ...]:
    """Of what is kept of each chunk: the state before it, what it writes, what it reads, the inverse."""
    return (key, value), (tokens, value), (tokens, key), (tokens, tokens)


def _backward_group(
    rows: int, inputs: tuple[Tensor, ...], kept: tuple[Any, ...], d_memory: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of a chunk group's q, k, v, beta and total, and that of the state before it from that of the state
    after it.

    `inputs`: q, k, v, beta and the gradient of y; `kept`: total, document and what the forward pass kept.
    """
    (q, k, v, beta, d_y), (total, document, before, delta, read, inverse) = inputs, kept
    column = beta[..., None]
    here, strong = decays(total, document, k.dtype), k * column
    d_delta, d_held = (q @ k.mT).mul_(here.pair).mT @ d_y, (q * here.carried).mT @ d_y
    writing, reading, remaining, d_states, d_deltas = (
        x.unflatten(0, (-1, rows)) for x in (k * here.written, read, here.kept, d_held, d_delta)
    )
    after, d_memory = _backward_states(writing, reading, remaining, d_states, d_deltas, d_memory)
    d_v = torch.bmm(inverse.mT, d_delta)  # of beta (v - carried k S), until it is multiplied by beta
    d_p, d_a = (d_y @ delta.mT).mul_(here.pair), (d_v @ delta.mT).mul_(here.pair).tril_(-1).neg_()
    d_writing = (delta @ after.mT).mul_(here.written)
    # q and beta k enter as readers, at exp(total); k as what is read, at exp(-total)
    d_q = torch.bmm(d_y, before.mT).mul_(here.carried).baddbmm_(d_p, k)
    d_strong = (d_v @ before.mT).mul_(-here.carried).baddbmm_(d_a, k)
    d_k = torch.baddbmm(d_writing, d_p.mT, q).baddbmm_(d_a.mT, strong)
    d_beta = (d_strong * k).sum(-1).add_((d_v * v).sum(-1))
    d_total = (d_q * q).addcmul_(d_strong, strong).addcmul_(d_k, k, value=-1).sum(-1)
    d_total[:, -1] += (d_writing * k).sum((-2, -1)) + here.kept[:, 0, 0] * (after * before).sum((-2, -1))
    return d_q, d_k.addcmul_(d_strong, column), d_v.mul_(column), d_beta, d_total, d_memory


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
    for n in alike(range(after.shape[0]), reverse=True):
        after[n] = d_memory
        d_delta_NRCV[n].baddbmm_(writing_NRCK[n], d_memory)
        d_memory = torch.addcmul(d_held_NRKV[n], kept_NR11[n], d_memory)
        d_memory.baddbmm_(read_NRCK[n].mT, d_delta_NRCV[n], alpha=-1)
    return after.flatten(0, 1), d_memory
