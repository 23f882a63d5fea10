"""The recurrence in time linear in T: attention inside chunks, one state from chunk to chunk, a backward of its own.

The backward gets the gradient of the log decays without the decay matrices: what q_i gains from
a log decay, k_j gains too, so d g_t is the sum over i >= t of q_i . dq_i - k_i . dk_i (2312.06635, appendix C), here
summed within the chunk and closed by the state after it, which holds all the rest.

Letters: B batch, H heads, T tokens, N chunks, C tokens of a chunk, K key dimension, V value dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from linearize.ops.decay_linear.decays import BLOCK, make_decays
from linearize.ops.decay_linear.documents import Documents, documents
from linearize.ops.layout import Layout

CHUNK = 64


def chunked(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, log_decay: Tensor, *, layout: Layout, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same arguments, outputs and values as `reference`."""
    tokens, device = q_BHTK.shape[2], q_BHTK.device
    chunk = min(CHUNK, -(-tokens // BLOCK) * BLOCK)
    if (live := layout.live()) is not None:
        k_BHTK = k_BHTK * live[:, None, :, None].to(k_BHTK.dtype)
        log_decay = log_decay.masked_fill(_like(~live, log_decay), 0)
    if (starts := layout.starts(tokens, device)) is not None:
        log_decay = log_decay.masked_fill(_like(starts, log_decay), 0)
    if state is None:
        state = q_BHTK.new_zeros(*q_BHTK.shape[:2], q_BHTK.shape[3], v_BHTV.shape[3])
    docs = documents(layout, tokens, chunk, device)
    parts = [_split(x, chunk) for x in (q_BHTK, k_BHTK, v_BHTV, log_decay)]
    y, after = _Chunked.apply(*parts, state.to(q_BHTK.dtype), docs)
    return y.flatten(2, 3)[:, :, :tokens], after


def _like(mask_BT: Tensor, x: Tensor) -> Tensor:
    return mask_BT[:, None] if x.dim() == 3 else mask_BT[:, None, :, None]


def _split(x_BHT: Tensor, chunk: int) -> Tensor:
    """`[B, H, T, ...] -> [B, H, N, C, ...]`, contiguous; tokens after the last are zeros, which change nothing."""
    missing = -x_BHT.shape[2] % chunk
    if missing:
        x_BHT = F.pad(x_BHT, (0,) * (2 * (x_BHT.dim() - 3)) + (0, missing))
    return x_BHT.contiguous().unflatten(2, (-1, chunk))


class _Chunked(torch.autograd.Function):
    """q, k: `[B, H, N, C, K]`; v: `[B, H, N, C, V]`; log decays `[B, H, N, C]` or with K; state `[B, H, K, V]`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, docs: Documents
    ) -> tuple[Tensor, Tensor]:
        decays = make_decays(log_decay, docs)
        scores = decays.scores(q, k)
        y = scores @ v
        before = _states((k * decays.leave).mT @ v, decays.through, state)
        y += (q * decays.enter) @ before[:, :, :-1]
        ctx.save_for_backward(q, k, v, log_decay, before, scores)
        ctx.docs, ctx.decays = docs, decays
        return y, before[:, :, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, d_after: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, before, scores = ctx.saved_tensors
        decays = ctx.decays
        d_y = d_y.contiguous()
        d_states = _states_backward((q * decays.enter).mT @ d_y, decays.through, d_after)
        d_v = scores.mT @ d_y
        d_v += (k * decays.leave) @ d_states[:, :, 1:]
        d_q, d_k = decays.scores_backward(d_y @ v.mT, q, k)
        d_q += (d_y @ before[:, :, :-1].mT).mul_(decays.enter)
        d_k += (v @ d_states[:, :, 1:].mT).mul_(decays.leave)
        d_log_decay = _decay_gradient(q * d_q - k * d_k, before[:, :, 1:] * d_states[:, :, 1:], log_decay, ctx.docs)
        return d_q, d_k, d_v, d_log_decay, d_states[:, :, 0].clone(), None


def _states(added_BHNKV: Tensor, through: Tensor, state_BHKV: Tensor) -> Tensor:
    """The state before each chunk and after the last, `[B, H, N + 1, K, V]`."""
    batch, heads, chunks, key, value = added_BHNKV.shape
    states = added_BHNKV.new_empty(batch, heads, chunks + 1, key, value)
    states[:, :, 0] = state_BHKV
    for n in range(chunks):
        torch.addcmul(added_BHNKV[:, :, n], through[:, :, n], states[:, :, n], out=states[:, :, n + 1])
    return states


def _states_backward(added_BHNKV: Tensor, through: Tensor, d_after_BHKV: Tensor) -> Tensor:
    """Gradients of what `_states` gives; `added`: what each state's own chunk adds to its gradient."""
    batch, heads, chunks, key, value = added_BHNKV.shape
    d_states = added_BHNKV.new_empty(batch, heads, chunks + 1, key, value)
    d_states[:, :, -1] = d_after_BHKV
    for n in reversed(range(chunks)):
        torch.addcmul(added_BHNKV[:, :, n], through[:, :, n], d_states[:, :, n + 1], out=d_states[:, :, n])
    return d_states


def _decay_gradient(per_token: Tensor, at_end: Tensor, log_decay: Tensor, docs: Documents) -> Tensor:
    """d g_t = sum of `per_token` from t to the end of its document or chunk, plus `at_end` where the chunk's end sees
    t.

    `per_token: [B, H, N, C, K]`, `at_end: [B, H, N, K, V]`.
    """
    if log_decay.dim() == 4:
        per_token, closing = per_token.sum(-1, keepdim=True), at_end.sum((-1, -2))[..., None, None]
    else:
        closing = at_end.sum(-1)[..., None, :]
    later = torch.matmul(docs.pair_BNCC[:, None].to(per_token.dtype).mT, per_token)
    if docs.leaves_BNC is not None:
        closing = closing * docs.leaves_BNC[:, None, :, :, None].to(closing.dtype)
    return (later + closing).view_as(log_decay) if log_decay.dim() == 5 else (later + closing)[..., 0]
