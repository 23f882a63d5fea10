"""Window + linear attention with one normaliser: `window_linear` picks the backend, every backend computes the same.

| backend | function | time and memory | for |
|---|---|---|---|
| reference | `reference.reference` | U x S | proof; outputs of a few tokens (padded decode and verification) |
| step | `multi_token.step` | S | one token without padding: decode |
| multi_token | `multi_token.multi_token` | U x S | a few tokens without padding: verification of a draft |
| chunked | `chunked.chunked` | linear in T | training, prefill |
| in_place | `in_place.in_place` | U x S | static layouts: ring and sum written where they are |
| triton | `../triton/window.py` | S, one launch | a few CUDA tokens without gradients; tail and draft together |
| triton_chunks | `../triton/window_chunks/` | linear in T | many CUDA tokens: training, prefill |

Read in this order:

| file | holds |
|---|---|
| `spec.py` | the options of a call, which tokens a window holds, the feature maps that kernels know |
| `reference.py` | the equation |
| `state.py` | the state as a value, the ring buffer behind it, and as buffers that are written in place |
| `slots.py` | ring and new tokens side by side; every document on a chunk boundary |
| `update.py` | the state after a call |
| `multi_token.py` | one token, and a few |
| `chunked.py` | many tokens: chunk groups, forward and backward |
| `masks.py` | what the queries of a chunk see, and what its memory takes up |
| `head_block.py` | a chunk group for some heads: outputs and gradients |
| `head_terms.py` | the softmax term and the linear term of one head |
| `decoder.py` | token after token of one row on a CPU, as `step`, in memory that is written in place |
| `in_place.py` | steps over buffers |
| `static_masks.py` | what their tokens see, and what leaves the window |
| `operator.py` | the kernel over buffers as one operator of a compiled graph |
| `backends.py` | which backend runs a call, and why |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from linearize.ops.dispatch import wants_gradients
from linearize.ops.layout import Layout
from linearize.ops.window_linear.backends import DISPATCH, WindowCall, cursor_of
from linearize.ops.window_linear.chunked import chunked
from linearize.ops.window_linear.in_place import in_place
from linearize.ops.window_linear.multi_token import multi_token, step
from linearize.ops.window_linear.operator import window_steps
from linearize.ops.window_linear.reference import reference
from linearize.ops.window_linear.slots import gather_slots
from linearize.ops.window_linear.spec import Branch, WindowLinear, WindowShape, weights_of
from linearize.ops.window_linear.state import WindowBuffers, WindowLinearState
from linearize.ops.window_linear.store import advance_with_store, with_store
from linearize.ops.window_linear.update import next_state

__all__ = [
    "BACKENDS",
    "Branch",
    "WindowLinear",
    "WindowLinearState",
    "WindowShape",
    "advance",
    "use_backend",
    "window_linear",
]

BACKENDS: dict[str, Callable[..., tuple[Tensor, WindowLinearState | None]]] = {
    "reference": reference,
    "chunked": chunked,
}
use_backend = DISPATCH.use  # of BACKENDS, or one of the kernels'


def window_linear(
    q_BHUD: Tensor,
    k_BGTD: Tensor,
    v_BGTV: Tensor,
    *,
    spec: WindowLinear,
    layout: Layout,
    state: WindowLinearState | WindowBuffers | None = None,
    need_state: bool = True,
    commit: int | None = None,
) -> tuple[Tensor, Any]:
    """Attend; returns `y: [B, H, U, V]` and the state after the last token (None unless `need_state`).

    `q_BHUD`: of the last U of the T tokens, which get outputs. `commit`: the state is that after the first `commit`
    tokens, at most T - U (None: after all). Half-precision inputs are computed in fp32 and the ring is kept in their
    dtype; the folded sum is at least fp32. `WindowBuffers` (of static layouts) are written in place and returned.
    """
    whole = q_BHUD.shape[2] == k_BGTD.shape[2]
    fixed, past = (state, None) if isinstance(state, WindowBuffers) else (None, state)
    options: dict[str, Any] = {"spec": spec, "layout": layout, "state": state, "need_state": need_state}

    def run(name: str) -> tuple[Tensor, Any]:
        if fixed is not None:
            last = k_BGTD.shape[2] if commit is None else commit
            return _in_place(name, q_BHUD, k_BGTD, v_BGTV, spec, layout, fixed, last if need_state else 0)
        if name == "triton" and (spec.has_window or spec.has_linear):
            return _steps(q_BHUD, k_BGTD, v_BGTV, commit=commit, **options)
        options["spec"] = spec.resolved()
        if spec.store and (name != "step" or not whole) and commit is None:
            return _in_torch(with_store, q_BHUD, k_BGTD, v_BGTV, **options)
        if name == "multi_token" and not spec.store and (spec.has_window or spec.has_linear):
            return _in_torch(multi_token, q_BHUD, k_BGTD, v_BGTV, commit=commit, **options)
        if name == "triton_chunks" and commit is None and (spec.has_window or spec.has_linear):
            return _chunks(q_BHUD, k_BGTD, v_BGTV, **options)
        if commit is not None:
            return _commit_then_attend(q_BHUD, k_BGTD, v_BGTV, options["spec"], layout, past, commit)
        backend = (BACKENDS | {"step": step}).get(name if whole else "reference", chunked)
        backend = backend if spec.has_window or spec.has_linear else nothing
        return _in_torch(backend, q_BHUD, k_BGTD, v_BGTV, **options)

    call = WindowCall(
        device=q_BHUD.device.type,
        dtype=q_BHUD.dtype,
        tokens=k_BGTD.shape[2],
        layout=layout,
        whole=whole,
        gradients=wants_gradients(q_BHUD, k_BGTD, v_BGTV, *_trained(spec)),
        spec=spec,
        cursor="rows" if fixed is not None else cursor_of(past, layout),
        in_place=fixed is not None,
        opaque=fixed is not None,
        widest=max(q_BHUD.shape[3], v_BGTV.shape[3]),
    )
    return DISPATCH.run(call, run)


def _trained(spec: WindowLinear) -> list[Tensor | None]:
    """What of the operation may be trained, as far as its maps say."""
    known = [weights_of(m) for m in (spec.feature_q, spec.feature_k)] if torch.is_grad_enabled() else []
    return [spec.log_window_factor_H, spec.linear_factor_H, *(w for m in known if m is not None for w in m.tensors)]


def _steps(*inputs: Tensor, **options: Any) -> tuple[Tensor, WindowLinearState | None]:
    """The multi-step kernel, which is imported when first asked for."""
    from linearize.ops.triton.window import window_linear_steps

    with torch.autocast(inputs[0].device.type, enabled=False):
        return window_linear_steps(*inputs, **options)


def _in_place(
    name: str,
    q_BHUD: Tensor,
    k_BGTD: Tensor,
    v_BGTV: Tensor,
    spec: WindowLinear,
    layout: Layout,
    state: WindowBuffers,
    commit: int,
) -> tuple[Tensor, WindowBuffers]:
    """A step over buffers: by the kernel (while `torch.compile` traces, as one operator), or in PyTorch."""
    if name != "triton" or not (spec.has_window or spec.has_linear):
        wide = torch.promote_types(q_BHUD.dtype, torch.float32)
        with torch.autocast(q_BHUD.device.type, enabled=False):
            qkv = (x.to(wide) for x in (q_BHUD, k_BGTD, v_BGTV))
            y = in_place(*qkv, spec=spec, layout=layout, state=state, commit=commit)
        return y.to(q_BHUD.dtype), state
    if torch.compiler.is_compiling():
        return window_steps(q_BHUD, k_BGTD, v_BGTV, spec=spec, layout=layout, state=state, commit=commit), state
    options: dict[str, Any] = {"spec": spec, "layout": layout, "state": state, "commit": commit}
    y, _ = _steps(q_BHUD, k_BGTD, v_BGTV, **options)
    return y, state


def _chunks(*inputs: Tensor, **options: Any) -> tuple[Tensor, WindowLinearState | None]:
    """The kernels over chunks, which are imported when first asked for."""
    from linearize.ops.triton.window_chunks.run import window_linear_chunks

    with torch.autocast(inputs[0].device.type, enabled=False):
        return window_linear_chunks(*inputs, **options)


def _in_torch(
    backend: Callable[..., tuple[Tensor, WindowLinearState | None]], *inputs: Tensor, **options: Any
) -> tuple[Tensor, WindowLinearState | None]:
    """A backend in PyTorch, in at least fp32 (the chunked one widens group by group)."""
    dtype = inputs[0].dtype
    wide = dtype if backend is chunked else torch.promote_types(dtype, torch.float32)
    if wide != dtype:
        inputs = tuple(x.to(wide) for x in inputs)
    if torch.is_autocast_enabled(inputs[0].device.type):
        with torch.autocast(inputs[0].device.type, enabled=False):
            y, after = backend(*inputs, **options)
    else:
        y, after = backend(*inputs, **options)
    return y.to(dtype), after if after is None else _narrow(after, dtype)


def _commit_then_attend(
    q_BHUD: Tensor,
    k_BGTD: Tensor,
    v_BGTV: Tensor,
    spec: WindowLinear,
    layout: Layout,
    state: WindowLinearState | None,
    commit: int,
) -> tuple[Tensor, WindowLinearState | None]:
    """The first `commit` tokens go into ring and sum, and the rest attend from there."""
    tokens = k_BGTD.shape[2]
    assert commit <= tokens - q_BHUD.shape[2]
    if commit:
        tail = slice(0, commit)
        state = advance(k_BGTD[:, :, tail], v_BGTV[:, :, tail], spec=spec, layout=layout.part(0, commit), state=state)
    rest, layout = slice(commit, None), layout.part(commit, tokens)
    y, _ = window_linear(
        q_BHUD, k_BGTD[:, :, rest], v_BGTV[:, :, rest], spec=spec, layout=layout, state=state, need_state=False
    )
    return y, state


def nothing(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTV: Tensor,
    *,
    spec: WindowLinear,
    layout: Layout,
    state: WindowLinearState | None = None,
    need_state: bool = True,
) -> tuple[Tensor, WindowLinearState | None]:
    """An ablation that leaves nothing to attend to (the window of pure linear attention): 0, and the usual state."""
    y = v_BGTV.new_zeros(*q_BHTD.shape[:3], v_BGTV.shape[3])
    after = next_state(gather_slots(k_BGTD, v_BGTV, layout, state, spec), layout, state, spec) if need_state else None
    return y, after


def advance(
    k_BGTD: Tensor, v_BGTV: Tensor, *, spec: WindowLinear, layout: Layout, state: WindowLinearState | None = None
) -> WindowLinearState:
    """The state after these tokens, without outputs: what a rollback replays."""
    dtype = k_BGTD.dtype
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(k_BGTD.device.type, enabled=False):
        k, v = k_BGTD.to(wide), v_BGTV.to(wide)
        if spec.store:
            return _narrow(advance_with_store(k, v, spec=spec, layout=layout, state=state), dtype)
        slots = gather_slots(k, v, layout, state, spec)
        return _narrow(next_state(slots, layout, state, spec), dtype)


def _narrow(state: WindowLinearState, dtype: torch.dtype) -> WindowLinearState:
    """Ring and sinks in the dtype of the keys and values, or wide where gradients come back through them: those would
    be rounded call by call. The sums stay wide."""
    names = ("k_BGRD", "v_BGRV", "sink_k_BGND", "sink_v_BGNV", "store_k_BGPD", "store_v_BGPV")
    wide = {n: x for n in names if (x := getattr(state, n)) is not None and x.dtype != dtype and not x.requires_grad}
    return replace(state, **{name: x.to(dtype) for name, x in wide.items()}) if wide else state
