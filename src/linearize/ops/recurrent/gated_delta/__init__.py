"""The gated delta rule (2412.06464): a state that decays per head and overwrites what a key already holds.

| backend | where | time and memory | for |
|---|---|---|---|
| reference | `../reference.py` | one product per token | proof; one token: decode |
| multi_token | `../multi_token.py` | T x T, the state once | a few tokens: verification of draft tokens |
| chunked | `chunked.py` | linear in T, products of chunks | training, prefill |
| fla | here | a Triton kernel | CUDA tensors, where `fla` is installed; documents as sequences |
| triton | `../../triton/recurrence.py` | one launch | a few CUDA tokens without gradients |

Letters: B batch, H heads, T tokens, U of them (the last) with an output, K key dimension, V value dimension.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from linearize.ops.dispatch import Dispatcher
from linearize.ops.layout import Layout
from linearize.ops.recurrent import multi_token, reference
from linearize.ops.recurrent.front_end import FLA, Backend, StepOptions, recurrent_rules, run_linear_recurrence
from linearize.ops.recurrent.gated_delta.chunked import chunked
from linearize.ops.varlen import in_sequences

__all__ = ["BACKENDS", "DISPATCH", "choice", "gated_delta", "use_backend"]

DISPATCH = Dispatcher("gated_delta", recurrent_rules(FLA, "many tokens: products of chunks"))
choice, use_backend = DISPATCH.choice, DISPATCH.use


def gated_delta(
    q_BHUK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    log_decay_BHT: Tensor,
    beta_BHT: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
    need_state: bool = True,
    commit: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T, y_t = S_t^T q_t; nothing is scaled.

    `q_BHUK`: of the last U of the T tokens, which get outputs. `log_decay_BHT`: g, at most 0. `state: [B, H, K, V]`, at
    least fp32. A token that opens a document finds a state of zeros; a dead one writes nothing and leaves the state
    alone, its outputs mean nothing.
    Returns `y: [B, H, U, V]` in the dtype of v, and the state after the first `commit` tokens (None: after all; no
    state unless `need_state`). Half-precision inputs are computed in fp32.
    """
    return run_linear_recurrence(
        DISPATCH,
        BACKENDS,
        q_BHUK,
        k_BHTK,
        v_BHTV,
        log_decay_BHT,
        beta_BHT,
        layout=layout,
        state=state,
        need_state=need_state,
        commit=commit,
    )


def fla_gated_delta(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    log_decay_BHT: Tensor,
    beta_BHT: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`y` in the dtype of v, 0 at dead tokens, and the fp32 state after the last token. Arguments as in fla 0.6.0."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # type: ignore[import-not-found]

    dtype = v_BHTV.dtype
    wide = torch.promote_types(dtype, torch.float32)
    inputs = (q_BHTK.to(dtype), k_BHTK.to(dtype), v_BHTV, log_decay_BHT.to(wide), beta_BHT.to(wide))
    state = None if state is None else state.to(wide)

    def call(tensors: tuple[Tensor, ...], first: Tensor | None, bounds: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v, g, beta = tensors
        y, after = chunk_gated_delta_rule(
            q=q,
            k=k,
            v=v,
            g=g,
            beta=beta,
            scale=1.0,
            initial_state=first,
            output_final_state=True,
            use_qk_l2norm_in_kernel=False,
            cu_seqlens=bounds,
        )
        return y, after

    return in_sequences(call, inputs, layout, state)


def _by_triton(*inputs: Tensor, **options: Unpack[StepOptions]) -> tuple[Tensor, Tensor | None]:
    from linearize.ops.triton.recurrence import gated_delta_steps

    return gated_delta_steps(*inputs, **options)


BACKENDS: dict[str, Backend] = {
    "reference": reference.gated_delta,
    "multi_token": multi_token.gated_delta,
    "chunked": chunked,
    "fla": fla_gated_delta,
    "triton": _by_triton,
}
