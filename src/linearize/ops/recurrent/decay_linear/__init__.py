"""Linear attention with decay: S_t = exp(g_t) S_{t-1} + k_t v_t^T, y_t = q_t^T S_t; g per head or per key dimension.

One operation for SSD (Mamba-2: q = C, k = B, v = dt x, g = dt A), retention and gated linear attention.

| backend | where | time | for |
|---|---|---|---|
| reference | `../reference.py` | T steps | proof; decode |
| multi_token | `../multi_token.py` | T x T, the state once | a few tokens: verification of draft tokens |
| chunked | `chunked.py` | linear in T, matrix products | training, prefill |
| fla | here | the same, in Triton | CUDA tensors, where `fla` is installed; documents as sequences |
| triton | `../../triton/recurrence.py` | one launch | a few CUDA tokens without gradients |

Letters: B batch, H query heads, G key/value heads, T tokens, U of them (the last) with an output, K key dimension,
V value dimension.
"""

from __future__ import annotations

from importlib import import_module
from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.ops.dispatch import Dispatcher
from linearize.ops.layout import Layout
from linearize.ops.recurrent import multi_token, reference
from linearize.ops.recurrent.decay_linear.chunked import chunked
from linearize.ops.recurrent.front_end import (
    FLA,
    Backend,
    StepOptions,
    recurrent_call,
    recurrent_rules,
    run_linear_recurrence,
)
from linearize.ops.varlen import in_sequences

__all__ = ["BACKENDS", "DISPATCH", "choice", "decay_linear", "gated_linear", "use_backend"]

DISPATCH = Dispatcher("decay_linear", recurrent_rules(FLA, "many tokens: products of chunks"))
choice, use_backend = DISPATCH.choice, DISPATCH.use


def decay_linear(
    q_BHUK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    log_decay: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
    need_state: bool = True,
    commit: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run the recurrence; returns `y: [B, H, U, V]` in the dtype of v and `S: [B, H, K, V]` (None unless `need_state`).

    `q_BHUK`: of the last U of the T tokens, which get outputs. `log_decay`: g <= 0, `[B, H, T]` or `[B, H, T, K]`.
    `commit`: S is that after the first `commit` tokens (None: after all). Nothing is scaled. Half precision is computed
    in fp32, and the state is fp32 (fp64 for fp64 inputs).
    """
    return run_linear_recurrence(
        DISPATCH,
        BACKENDS,
        q_BHUK,
        k_BHTK,
        v_BHTV,
        log_decay,
        layout=layout,
        state=state,
        need_state=need_state,
        commit=commit,
    )


def gated_linear(
    q_BHUK: Tensor,
    k_BGTK: Tensor,
    v_BGTV: Tensor,
    keys_BGTK: Tensor,
    *,
    gate_divisor: float,
    layout: Layout,
    state: Tensor | None = None,
    need_state: bool = True,
    commit: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`decay_linear` of softmax(q), softmax(k), v and logsigmoid(keys) / `gate_divisor` (Liger, 2503.01496).

    Query heads of a group share keys, values and state. Returns `y: [B, H, U, V]` in the dtype of v, and the state
    `[B, G, K, V]`, at least fp32, after the first `commit` tokens (None: after all; no state unless `need_state`).
    """
    inputs = (q_BHUK, k_BGTK, v_BGTV, keys_BGTK)
    group = q_BHUK.shape[1] // k_BGTK.shape[1]

    def by_kernel() -> tuple[Tensor, Tensor | None]:
        from linearize.ops.triton.recurrence import decay_linear_steps

        until = commit if need_state else 0
        y, after = decay_linear_steps(*inputs, layout=layout, state=state, commit=until, gate_divisor=gate_divisor)
        return y, after if need_state else None

    def by_operations() -> tuple[Tensor, Tensor | None]:
        q, k, keys = (_wide(x) for x in (q_BHUK, k_BGTK, keys_BGTK))
        k, v, log_decay = (_repeat(x, group) for x in (k.softmax(-1), v_BGTV, F.logsigmoid(keys) / gate_divisor))
        before = None if state is None else _repeat(state, group)
        y, after = decay_linear(
            q.softmax(-1), k, v, log_decay, layout=layout, state=before, need_state=need_state, commit=commit
        )
        return y, None if after is None else after[:, ::group].contiguous()

    call = recurrent_call(*inputs, state, layout=layout)
    if DISPATCH.choice(call)[0] != "triton":
        return by_operations()
    return DISPATCH.run(call, lambda backend: by_kernel() if backend == "triton" else by_operations())


def fla_decay_linear(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, log_decay: Tensor, *, layout: Layout, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same arguments and values as `reference`; y in the dtype of v, fp32 state, 0 at dead tokens."""
    module, name = ("simple_gla", "chunk_simple_gla") if log_decay.dim() == 3 else ("gla", "chunk_gla")
    op = getattr(import_module(f"fla.ops.{module}"), name)
    wide = torch.promote_types(v_BHTV.dtype, torch.float32)
    inputs = (q_BHTK.to(v_BHTV.dtype), k_BHTK.to(v_BHTV.dtype), v_BHTV, log_decay.to(wide))
    state = None if state is None else state.to(wide)

    def call(tensors: tuple[Tensor, ...], first: Tensor | None, bounds: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v, g = tensors
        y, after = op(q, k, v, g=g, scale=1.0, initial_state=first, output_final_state=True, cu_seqlens=bounds)
        return y, after

    return in_sequences(call, inputs, layout, state)


def _by_triton(*inputs: Tensor, **options: Unpack[StepOptions]) -> tuple[Tensor, Tensor | None]:
    from linearize.ops.triton.recurrence import decay_linear_steps

    return decay_linear_steps(*inputs, **options)


BACKENDS: dict[str, Backend] = {
    "reference": reference.decay_linear,
    "multi_token": multi_token.decay_linear,
    "chunked": chunked,
    "fla": fla_decay_linear,
    "triton": _by_triton,
}


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _repeat(x_BG: Tensor, group: int) -> Tensor:
    """Every key/value head for each of its query heads."""
    return x_BG if group == 1 else x_BG.repeat_interleave(group, dim=1)
