"""The gradients of window + linear attention by kernels.

Letters: B batch, G key/value heads, R query heads for each, H = G R, T new tokens, S slots (ring, then new tokens), N
chunks, J sinks, D head dimension, V value dimension, F columns of the feature map, Q all features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.ops.triton.launch import rows_of
from linearize.ops.triton.window_chunks import carry, gradients, key_gradients
from linearize.ops.triton.window_chunks.call import Call, Mapped, dims, join, pointer, precision, strides, weights
from linearize.ops.triton.window_chunks.sizes import block
from linearize.ops.triton.window_chunks.tiles import GIVEN


def backward(
    call: Call,
    maps: tuple[Mapped, Mapped],
    d_y: Tensor,
    inputs: tuple[Tensor, ...],
    factors: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of `_Attend.forward`'s arguments.

    `inputs`: q, k, v and the sinks' k and v. `factors`: log g, the linear term's factor, the sums before each run.
    `outputs`: y, shift, normaliser and the place of each query's largest score.
    """
    y, shift, normaliser, top = outputs
    d_y = rows_of(d_y)
    delta = (d_y.float() * y.float()).sum(-1)
    row_sum = torch.zeros_like(delta)
    known = (d_y, delta, shift, normaliser, top)
    by_query = _query_gradients(call, maps, inputs, factors, known, row_sum)  # writes row_sum, which the keys need
    by_key = _key_gradients(call, maps, inputs[:3], factors[:2], (*known, row_sum))
    d_q, d_phi_q, d_sink_k, d_sink_v, d_weight_q, d_bias_q, d_log_g, d_factor = by_query
    d_k, d_v, d_phi_k, d_weight_k, d_bias_k = by_key
    return (
        d_q, d_k, d_v, d_sink_k, d_sink_v, d_phi_q, d_weight_q, d_bias_q, d_phi_k, d_weight_k, d_bias_k, d_log_g,
        d_factor, None, None,
    )  # fmt: skip


def _parameter_gradients(
    call: Call, batch: int, runs: int, like: Tensor, sizes: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Memory for the runs' gradients of weight and bias."""
    lines = batch * call.heads
    fused = call.kind != GIVEN and call.spec.has_linear
    size = (lines, runs, sizes["D"], call.columns) if fused else (1,)
    return like.new_empty(size, dtype=torch.float32), like.new_empty(lines, runs, call.columns, dtype=torch.float32)


def _per_parameter(
    call: Call, mapped: Mapped, batch: int, d_weight: Tensor, d_bias: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of weight and bias: those of all rows and runs added up."""
    if mapped.weight is None or not call.spec.has_linear:
        return None, None
    weight = d_weight.unflatten(0, (batch, -1)).sum((0, 2))
    return weight, None if mapped.bias is None else d_bias.unflatten(0, (batch, -1)).sum((0, 2)).to(mapped.bias.dtype)


def _query_gradients(
    call: Call,
    maps: tuple[Mapped, Mapped],
    inputs: tuple[Tensor, ...],
    factors: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    row_sum: Tensor,
) -> tuple[Tensor | None, ...]:
    q, k, v, sink_k, sink_v = inputs
    log_g, factor, sums = factors
    (batch, heads, tokens), sizes, runs = q.shape[:3], dims(k, v), call.runs(call.tables.chunks)
    d_y, *others = outputs
    phi_q, phi_k = pointer(maps[0].phi, q), pointer(maps[1].phi, k)
    d_q = torch.zeros_like(q, memory_format=torch.contiguous_format)
    d_phi = None if maps[0].phi is None else torch.zeros_like(phi_q, memory_format=torch.contiguous_format)
    d_sinks = [
        None if x is None else x.new_empty(*x.shape[:2], heads, *x.shape[3:], dtype=torch.float32)
        for x in (sink_k, sink_v)
    ]
    d_weight, d_bias = _parameter_gradients(call, batch, runs, q, sizes)
    d_log_g, d_factor = (q.new_zeros(batch * heads, runs, dtype=torch.float32) for _ in range(2))
    gradients.queries_kernel[(batch * heads, runs)](
        q, k, v, phi_q, phi_k, pointer(sink_k, k), pointer(sink_v, v), *weights(maps, q), log_g, factor, *call.places,
        call.begins, pointer(sums, d_q), d_y, *others, d_q, pointer(d_phi, d_q), *(pointer(x, d_q) for x in d_sinks),
        d_weight, d_bias, d_log_g, d_factor, row_sum,
        *(strides(x) for x in (q, k, v, phi_q, phi_k, d_y, d_q, pointer(d_phi, d_q))),
        *call.tables.strides, call.past, tokens, call.tables.chunks, runs, call.spec.scaling, call.spec.softcap or 1.0,
        R=heads // k.shape[1], BLOCK_J=block(call.spec.num_sinks), BEGINS=call.tables.begins is not None,
        **call.constants, **call.options, **sizes, **precision(q),
    )  # fmt: skip
    sinks = (None if d is None else d.unflatten(2, (k.shape[1], -1)).sum(3).to(k.dtype) for d in d_sinks)
    heads_of = (x.unflatten(0, (batch, -1)).sum((0, 2)) for x in (d_log_g, d_factor))
    return d_q, d_phi, *sinks, *_per_parameter(call, maps[0], batch, d_weight, d_bias), *heads_of


def _key_gradients(
    call: Call,
    maps: tuple[Mapped, Mapped],
    inputs: tuple[Tensor, ...],
    factors: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    q, k, v = inputs
    (batch, heads, tokens), groups, sizes = q.shape[:3], k.shape[1], dims(k, v)
    d_y, delta, shift, normaliser, top, row_sum = outputs
    runs = call.runs(call.tables.chunks + 2)
    phi_q, phi_k = pointer(maps[0].phi, q), pointer(maps[1].phi, k)
    d_k, d_v = (x.new_zeros(batch, heads, x.shape[2], x.shape[3], dtype=torch.float32) for x in (k, v))
    d_phi = None if maps[1].phi is None else torch.zeros_like(phi_k, memory_format=torch.contiguous_format)
    d_weight, d_bias = _parameter_gradients(call, batch, runs, q, sizes)
    sums = _gradient_sums(call, maps[0], (q, k, v), factors[1], outputs, runs) if call.spec.has_linear else d_k
    key_gradients.keys_kernel[(batch * heads, runs)](
        q, k, v, phi_q, phi_k, *weights(maps, q), *factors, *call.places, sums, d_y, delta, shift, normaliser, top,
        row_sum, d_k, d_v, pointer(d_phi, d_k), d_weight, d_bias,
        *(strides(x) for x in (q, k, v, phi_q, phi_k, d_y, d_k, d_v, pointer(d_phi, d_k))), *call.tables.strides,
        call.past, tokens, call.tables.chunks, runs, call.spec.scaling, call.spec.softcap or 1.0, R=heads // groups,
        **call.constants, **call.options, **sizes, **precision(q),
    )  # fmt: skip
    grouped = (d.unflatten(1, (groups, -1)).sum(2).to(k.dtype) for d in (d_k, d_v))
    return *grouped, d_phi, *_per_parameter(call, maps[1], batch, d_weight, d_bias)


def _gradient_sums(
    call: Call, queries: Mapped, inputs: tuple[Tensor, ...], factor: Tensor, outputs: tuple[Tensor, ...], runs: int
) -> Tensor:
    """The gradient of the folded sum that the run after each hands on, `[B H, runs, Q, V + 1]`."""
    (q, k, v), (d_y, delta, shift, normaliser, *_) = inputs, outputs
    batch, heads, tokens = q.shape[:3]
    sums = q.new_empty(batch * heads, runs, call.halves * call.columns, v.shape[-1] + 1, dtype=torch.float32)
    carries, phi = sums.new_empty(batch * heads, runs), pointer(queries.phi, q)
    carry.gradient_runs_kernel[(batch * heads, runs)](
        q, phi, pointer(queries.weight, q), pointer(queries.bias, q), d_y, delta, normaliser, shift, factor,
        call.tables.slot, call.tables.keep, sums, carries, *(strides(x) for x in (q, phi, d_y)), *call.tables.strides,
        call.past, tokens, call.tables.chunks, runs, SHARED=call.spec.shared_shift, **call.constants, **dims(k, v),
        **precision(q),
    )  # fmt: skip
    join(sums, carries, None, reverse=True)
    return sums
