"""The selective scan forward and backward in time linear in T, plain PyTorch.

T is cut into blocks. Decays and inputs of a whole block are made at once; what is sequential is a single in-place
multiply-add per token over [B, G, N, P] numbers (a scan in one pass: nothing is computed twice or squared). Only the
state at the start of each block is kept for the backward, which makes a block's states again and runs

    dL/dh_t = C_t dL/dy_t + exp(dt_{t+1} A) dL/dh_{t+1}

from the last block to the first (2312.00752, section 3.3.2: recomputation).

Letters: B batch, T tokens, Q tokens of a block, E channels = G groups x P channels, N state size. The channels are
innermost, so that every product and sum runs along contiguous numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize.ops.blocking import alike
from linearize.ops.layout import Layout

BLOCK = 32


def chunked(
    x_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
    need_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Scan; same arguments, outputs and values as `reference`."""
    rows, tokens, _ = x_BTE.shape
    groups, size = B_BTGN.shape[2:]
    opens_BT = layout.starts(tokens, x_BTE.device)
    opens_TB = None if opens_BT is None else opens_BT.expand(rows, -1).transpose(0, 1)
    u_TBGP, dt_TBGP = ((w.transpose(0, 1).unflatten(-1, (groups, -1))) for w in (x_BTE * dt_BTE, dt_BTE))
    A_GNP = A_EN.unflatten(0, (groups, -1)).transpose(-1, -2).contiguous()
    if state is None:
        h_BGNP = x_BTE.new_zeros(rows, *A_GNP.shape)
    else:
        h_BGNP = state.unflatten(1, (groups, -1)).transpose(-1, -2)
    B_TBGN, C_TBGN = B_BTGN.transpose(0, 1), C_BTGN.transpose(0, 1)
    y_TBGP, h_BGNP = _Scan.apply(u_TBGP, dt_TBGP, A_GNP, B_TBGN, C_TBGN, h_BGNP, opens_TB)
    y_BTE = y_TBGP.flatten(2).transpose(0, 1)
    if not need_state:
        return y_BTE, None
    return y_BTE, h_BGNP.transpose(-1, -2).reshape(rows, groups * A_GNP.shape[-1], size)


class _Scan(torch.autograd.Function):
    """y and the last state from u = dt x, dt, A, B, C and the first state."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h_BGNP: Tensor, opens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Blocks one after the other; keeps the state at the start of each."""
        tokens, y = u.shape[0], torch.empty(u.shape, dtype=u.dtype, device=u.device)
        block = _Block(u, dt, A, B, opens)
        keep = any(ctx.needs_input_grad)
        starts = h_BGNP.new_empty((-(-tokens // BLOCK) if keep else 0, *h_BGNP.shape))
        scratch = torch.empty_like(block.decay)
        for i, at in alike([*enumerate(range(0, tokens, BLOCK))]):
            if keep:
                starts[i] = h_BGNP
            end = min(at + BLOCK, tokens)
            h_QBGNP = block.states(at, end, h_BGNP)
            y[at:end] = torch.mul(h_QBGNP, C[at:end].unsqueeze(-1), out=scratch[: end - at]).sum(-2)
            h_BGNP = h_QBGNP[-1]
        ctx.save_for_backward(u, dt, A, B, C, starts, *(() if opens is None else (opens,)))
        return y, h_BGNP.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, carry_BGNP: Tensor) -> tuple[Tensor | None, ...]:
        """Blocks from the last to the first; `carry` is the gradient of the state after the block."""
        u, dt, A, B, C, starts, *rest = ctx.saved_tensors
        tokens, block = u.shape[0], _Block(u, dt, A, B, rest[0] if rest else None)
        grad_u, grad_dt, grad_B, grad_C = (torch.empty(w.shape, dtype=w.dtype, device=w.device) for w in (u, dt, B, C))
        grad_A = torch.zeros_like(A)
        scratch, buffer = torch.empty_like(block.decay), torch.empty_like(block.decay)
        for i in alike(range(starts.shape[0]), reverse=True):
            at, end = i * BLOCK, min((i + 1) * BLOCK, tokens)
            here, some, grad_h = slice(at, end), scratch[: end - at], buffer[: end - at]
            h_QBGNP = block.states(at, end, starts[i])
            grad_y_here = grad_y[here].unsqueeze(-2)
            grad_C[here] = torch.mul(h_QBGNP, grad_y_here, out=some).sum(-1)
            torch.mul(C[here].unsqueeze(-1), grad_y_here, out=grad_h)
            carry_BGNP = block.pull_back(grad_h, carry_BGNP)
            grad_B[here] = torch.mul(grad_h, u[here].unsqueeze(-2), out=some).sum(-1)
            grad_u[here] = torch.mul(grad_h, B[here].unsqueeze(-1), out=some).sum(-2)
            grad_exponent = grad_h.mul_(block.decay[: end - at]).mul_(block.before(end - at))
            grad_dt[here] = torch.mul(grad_exponent, A, out=some).sum(-2)
            grad_A += torch.mul(grad_exponent, dt[here].unsqueeze(-2), out=some).sum((0, 1))
        return grad_u, grad_dt, grad_A, grad_B, grad_C, carry_BGNP, None


class _Block:
    """Decays and states of one block, in buffers that every block uses again."""

    def __init__(self, u_TBGP: Tensor, dt_TBGP: Tensor, A_GNP: Tensor, B_TBGN: Tensor, opens_TB: Tensor | None) -> None:
        self.u, self.dt, self.A, self.B, self.opens = u_TBGP, dt_TBGP, A_GNP, B_TBGN, opens_TB
        size = (min(BLOCK, u_TBGP.shape[0]), u_TBGP.shape[1], *A_GNP.shape)
        self.decay = u_TBGP.new_empty(size)
        self._states = u_TBGP.new_empty(size[0] + 1, *size[1:])

    def states(self, at: int, end: int, start_BGNP: Tensor) -> Tensor:
        """The state after each token of the block, `[Q, B, G, N, P]`; its decays are then in `decay`."""
        decay, h = self.decay[: end - at], self._states[: end - at + 1]
        torch.mul(self.dt[at:end].unsqueeze(-2), self.A, out=decay).exp_()
        if self.opens is not None:
            decay.masked_fill_(self.opens[at:end, :, None, None, None], 0)
        h[0] = start_BGNP
        torch.mul(self.B[at:end].unsqueeze(-1), self.u[at:end].unsqueeze(-2), out=h[1:])
        before, *after = h.unbind(0)
        for decay_t, h_t in alike([*zip(decay.unbind(0), after, strict=True)]):
            before = h_t.addcmul_(decay_t, before)
        return h[1:]

    def before(self, tokens: int) -> Tensor:
        """The state before each token of the block that `states` made last."""
        return self._states[:tokens]

    def pull_back(self, grad_h: Tensor, carry_BGNP: Tensor) -> Tensor:
        """Add to each state's gradient, in place, what the later tokens give; returns the first state's gradient."""
        decays, grads = self.decay[: len(grad_h)].unbind(0), grad_h.unbind(0)
        later = grads[-1].add_(carry_BGNP)
        for t in alike(range(len(grads) - 1), reverse=True):
            later = grads[t].addcmul_(decays[t + 1], later)
        return decays[0] * later
