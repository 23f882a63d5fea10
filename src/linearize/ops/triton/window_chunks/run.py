"""`window_linear` by kernels: training, prefill and prefill in pieces; the gradients are in `backward.py`.

Letters: B batch, G key/value heads, R query heads for each, H = G R, T new tokens, S slots (ring, then new tokens), N
chunks, J sinks, D head dimension, V value dimension, F columns of the feature map, Q all features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.triton.launch import rows_of
from linearize.ops.triton.window_chunks import attend
from linearize.ops.triton.window_chunks.backward import backward
from linearize.ops.triton.window_chunks.call import (
    Call,
    Mapped,
    dims,
    join,
    per_head,
    pointer,
    precision,
    run_sums,
    strides,
    weights,
)
from linearize.ops.triton.window_chunks.sizes import Sizes, Tables, block
from linearize.ops.window_linear.chunked import sinks_of
from linearize.ops.window_linear.slots import gather_slots
from linearize.ops.window_linear.spec import WindowLinear, chunk_of
from linearize.ops.window_linear.state import WindowLinearState
from linearize.ops.window_linear.update import next_state

FOLD_CHUNK = 64


def window_linear_chunks(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTV: Tensor,
    *,
    spec: WindowLinear,
    layout: Layout,
    state: WindowLinearState | None = None,
    need_state: bool = True,
    sizes: Sizes | None = None,
) -> tuple[Tensor, WindowLinearState | None]:
    """Attend; arguments, outputs and values of `ops.window_linear.chunked`, in the inputs' own dtype. `sizes`: None is
    by the window. No gradient goes into the state."""
    sizes = sizes or Sizes(chunk_of(spec.window, spec.shape))
    slots = gather_slots(k_BGTD, v_BGTV, layout, state, spec)
    tables, alignment = Tables.of(slots, layout, sizes.chunk, spec)
    sinks: tuple[Tensor | None, ...] = (None, None)
    if spec.num_sinks and spec.has_window:
        sinks = sinks_of(slots, alignment, state, spec)
    maps = [
        Mapped.of(f if spec.has_linear else None, x)
        for f, x in ((spec.feature_q, q_BHTD), (spec.feature_k, slots.k_BGSD))
    ]
    call = Call(
        spec=spec, sizes=sizes, tables=tables, past=slots.num_past, kind=maps[0].kind, columns=maps[0].columns,
        heads=q_BHTD.shape[1],
    )  # fmt: skip
    memory = state.memory_BHFV if state is not None and spec.has_linear else None
    factors = (
        per_head(x, default, q_BHTD) for x, default in ((spec.log_window_factor_H, 0.0), (spec.linear_factor_H, 1.0))
    )
    inputs = (slots.k_BGSD, slots.v_BGSV, *sinks, *maps[0].tensors, *maps[1].tensors, *factors)
    y: Tensor = _Attend.apply(q_BHTD, *inputs, memory, call)
    return y, next_state(slots, layout, state, spec, fold=fold) if need_state else None


def fold(
    k_BGSD: Tensor, v_BGSV: Tensor, weight_BS: Tensor | None, memory_BHQV: Tensor | None, spec: WindowLinear
) -> Tensor:
    """memory + sum over slots of weight phi_k(k) [v, 1]^T, `[B, H, Q, V + 1]` fp32; weights are 0 or 1."""
    assert spec.feature_k is not None
    mapped = Mapped.of(spec.feature_k, k_BGSD).like(k_BGSD)
    heads = (mapped.phi if mapped.weight is None else mapped.weight[None]).shape[1]  # type: ignore[union-attr]
    tables = Tables.in_a_row(weight_BS, k_BGSD.shape[2], FOLD_CHUNK, k_BGSD.device)
    call = Call(
        spec=spec, sizes=Sizes(FOLD_CHUNK), tables=tables, past=0, kind=mapped.kind, columns=mapped.columns, heads=heads
    )  # fmt: skip
    sums, _ = run_sums(call, rows_of(k_BGSD), rows_of(v_BGSV), mapped, sinks=0)
    added = sums.sum(1).unflatten(0, (k_BGSD.shape[0], -1))
    return added if memory_BHQV is None else memory_BHQV + added


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink_k: Tensor | None,
        sink_v: Tensor | None,
        phi_q: Tensor | None,
        weight_q: Tensor | None,
        bias_q: Tensor | None,
        phi_k: Tensor | None,
        weight_k: Tensor | None,
        bias_k: Tensor | None,
        log_g: Tensor,
        factor: Tensor,
        memory: Tensor | None,
        call: Call,
    ) -> Tensor:
        q, k, v = rows_of(q), rows_of(k), rows_of(v)
        sink_k, sink_v = (None if x is None else x.contiguous() for x in (sink_k, sink_v))
        mapped = (phi_q, weight_q, bias_q, phi_k, weight_k, bias_k)
        maps = call.maps(*mapped, like=q)
        sums = _sums(call, k, v, maps[1], memory)
        batch, heads, tokens = q.shape[:3]
        y = torch.zeros(batch, heads, tokens, v.shape[-1], dtype=q.dtype, device=q.device)
        shift, normaliser = (torch.zeros(batch, heads, tokens, device=q.device) for _ in range(2))
        top = torch.full((batch, heads, tokens), -1, dtype=torch.int32, device=q.device)
        parts = _linear(call, maps, (q, k, v), factor, sums)
        attend.attend_kernel[(batch * heads, call.runs(call.tables.chunks))](
            q, k, v, pointer(sink_k, k), pointer(sink_v, v), log_g, *call.places, call.begins,
            *(pointer(x, shift) for x in parts), y, shift, normaliser, top, *(strides(x) for x in (q, k, v, y)),
            *call.tables.strides, call.past, tokens, call.tables.chunks, call.spec.scaling, call.spec.softcap or 1.0,
            R=heads // k.shape[1], BLOCK_J=block(call.spec.num_sinks), BEGINS=call.tables.begins is not None,
            WINDOW=call.spec.has_window, LINEAR=call.spec.has_linear, **call.constants, **call.scores, **dims(k, v),
            **precision(q),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, sink_k, sink_v, *mapped, log_g, factor, sums, y, shift, normaliser, top)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv_sinks, mapped, others = ctx.saved_tensors[:5], ctx.saved_tensors[5:11], ctx.saved_tensors[11:]
        maps = ctx.call.maps(*mapped, like=qkv_sinks[0])
        factors, outputs = others[:3], others[3:]
        return backward(ctx.call, maps, grads[0], qkv_sinks, factors, outputs)


def _sums(call: Call, k: Tensor, v: Tensor, keys: Mapped, memory: Tensor | None) -> Tensor | None:
    """The folded sum before each run, `[B H, runs, Q, V + 1]`; None without a linear part."""
    if not call.spec.has_linear:
        return None
    sums, carries = run_sums(call, k, v, keys, call.spec.num_sinks)
    start = None
    if memory is not None:
        goes_on = call.tables.keep[:, :1, None, None].to(memory.dtype)
        start = (memory * goes_on).to(torch.float32).flatten(0, 1).contiguous()
    join(sums, carries, start, reverse=False)
    return sums


def _linear(
    call: Call, maps: tuple[Mapped, Mapped], qkv: tuple[Tensor, Tensor, Tensor], factor: Tensor, sums: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Numerator `[B, H, T, V]` and denominator `[B, H, T]` of the linear part, fp32; its parts one after the other."""
    if sums is None:
        return None, None
    q, k, v = qkv
    (batch, heads, tokens), runs = q.shape[:3], call.runs(call.tables.chunks)
    numerator = q.new_zeros(batch, heads, tokens, v.shape[-1], dtype=torch.float32)
    denominator = q.new_zeros(batch, heads, tokens, dtype=torch.float32)
    inputs = (*qkv, *(pointer(x.phi, q) for x in maps))
    for part in range(call.parts):
        attend.remember_kernel[(batch * heads, runs)](
            *inputs, *weights(maps, q), factor, *call.places, sums, numerator, denominator,
            *(strides(x) for x in inputs), *call.tables.strides, call.past, tokens, call.tables.chunks, runs, part,
            R=heads // k.shape[1], FAR=call.far, **call.constants, **call.features, **call.window, **dims(k, v),
            **precision(q),
        )  # fmt: skip
    return numerator, denominator
