"""The gradients of window + linear attention by kernels.

Letters: B batch, G key/value heads, R query heads for each, H = G R, T new tokens, S slots (ring, then new tokens), N
chunks, J sinks, D head dimension, V value dimension, F columns of the feature map, Q all features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.ops.triton.launch import rows_of
from linearize.ops.triton.window_chunks import carry, gradients, linear_gradients
from linearize.ops.triton.window_chunks.call import Call, Mapped, dims, join, pointer, precision, strides, weights
from linearize.ops.triton.window_chunks.sizes import block

TILE = 32  # queries that a tile of keys takes at a time: more do not fit into registers beside its gradients


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
    d_q = q.new_zeros(q.shape, dtype=torch.float32)
    d_sinks = [
        None if x is None else x.new_empty(*x.shape[:2], heads, *x.shape[3:], dtype=torch.float32)
        for x in (sink_k, sink_v)
    ]
    d_log_g, d_factor = (q.new_zeros(batch * heads, runs, dtype=torch.float32) for _ in range(2))
    if call.spec.has_window:
        gradients.queries_kernel[(batch * heads, runs)](
            q, k, v, pointer(sink_k, k), pointer(sink_v, v), log_g, *call.places, call.begins, *outputs, d_q,
            *(pointer(x, d_q) for x in d_sinks), d_log_g, row_sum, *(strides(x) for x in (q, k, v, outputs[0], d_q)),
            *call.tables.strides, call.past, tokens, call.tables.chunks, runs, call.spec.scaling,
            call.spec.softcap or 1.0, R=heads // k.shape[1], BLOCK_J=block(call.spec.num_sinks),
            BEGINS=call.tables.begins is not None, **call.constants, **call.scores, **sizes, **precision(q),
        )  # fmt: skip
    of_map: tuple[Tensor | None, ...] = (None, None, None)
    if call.spec.has_linear:
        d_z = _linear_part(
            call, linear_gradients.query_features_kernel, maps, (q, k, v), (factor, sums, *outputs[:4]), maps[0], q,
            (d_factor,), runs,
        )  # fmt: skip
        of_map = _map_gradients(call, maps[0], q, d_z, d_q, call.past)
    sinks = (None if d is None else d.unflatten(2, (k.shape[1], -1)).sum(3).to(k.dtype) for d in d_sinks)
    heads_of = (x.unflatten(0, (batch, -1)).sum((0, 2)) for x in (d_log_g, d_factor))
    return d_q.to(q.dtype), of_map[0], *sinks, *of_map[1:], *heads_of


def _key_gradients(
    call: Call,
    maps: tuple[Mapped, Mapped],
    inputs: tuple[Tensor, ...],
    factors: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    q, k, v = inputs
    (batch, heads, tokens), groups = q.shape[:3], k.shape[1]
    log_g, factor = factors
    d_k, d_v = (x.new_zeros(batch, heads, x.shape[2], x.shape[3], dtype=torch.float32) for x in (k, v))
    if call.spec.has_window:
        gradients.keys_kernel[(batch * heads, call.runs(call.tables.chunks))](
            *inputs, log_g, *call.places, *outputs, d_k, d_v, *(strides(x) for x in (*inputs, outputs[0], d_k, d_v)),
            *call.tables.strides, call.past, tokens, call.tables.chunks, call.spec.scaling, call.spec.softcap or 1.0,
            R=heads // groups, T=min(TILE, call.sizes.chunk), **call.constants, **call.scores, **dims(k, v),
            **precision(q),
        )  # fmt: skip
    of_map: tuple[Tensor | None, ...] = (None, None, None)
    if call.spec.has_linear:
        runs = call.runs(call.tables.chunks + 2)
        sums = _gradient_sums(call, maps[0], inputs, factor, outputs, runs)
        d_z = _linear_part(
            call, linear_gradients.key_features_kernel, maps, inputs, (factor, sums, *outputs[:4]), maps[1], k,
            (d_v,), runs,
        )  # fmt: skip
        of_map = _map_gradients(call, maps[1], k, d_z, d_k, 0)
    grouped = (d.unflatten(1, (groups, -1)).sum(2).to(k.dtype) for d in (d_k, d_v))
    return *grouped, *of_map


def _linear_part(
    call: Call,
    kernel: Any,
    maps: tuple[Mapped, Mapped],
    inputs: tuple[Tensor, ...],
    known: tuple[Tensor, ...],
    mapped: Mapped,
    x: Tensor,
    beside: tuple[Tensor, ...],
    runs: int,
) -> Tensor:
    """The gradient of x W of a feature map of x (of phi, where it is given), `[B, H, S, F]`; parts of the features one
    after the other. `known`: factor, sums, d_y, delta, shift, normaliser; `beside`: what else the kernel adds to."""
    (q, k, v), (factor, sums, d_y, *others) = inputs, known
    if mapped.phi is None:
        d_z = x.new_zeros(x.shape[0], call.heads, x.shape[2], call.columns, dtype=torch.float32)
    else:
        d_z = torch.zeros_like(mapped.phi, memory_format=torch.contiguous_format)
    phi = tuple(pointer(m.phi, q) for m in maps)
    shaped = (*inputs, *phi, d_y, *(t for t in beside if t.dim() == 4), d_z)
    for part in range(call.parts):
        kernel[(q.shape[0] * call.heads, runs)](
            *inputs, *phi, *weights(maps, q), factor, *call.places, sums, d_y, *others, *beside, d_z,
            *(strides(t) for t in shaped), *call.tables.strides, call.past, q.shape[2], call.tables.chunks, runs, part,
            R=call.heads // k.shape[1], SHARED=call.spec.shared_shift, FAR=call.far, **call.constants,
            **call.features, **call.window, **dims(k, v), **precision(q),
        )  # fmt: skip
    return d_z


def _map_gradients(
    call: Call, mapped: Mapped, x: Tensor, d_z: Tensor, d_x: Tensor, past: int
) -> tuple[Tensor | None, ...]:
    """The gradients of phi, weight and bias, of which one is `d_z`; that of x is added to `d_x`.

    Slot `past` is the first of x.
    """
    if mapped.weight is None:
        return d_z, None, None
    (batch, heads, size), runs, dim = d_z.shape[:3], call.runs(call.tables.chunks), x.shape[-1]
    d_weight = d_z.new_empty(batch * heads, runs, dim, call.columns)
    d_bias = d_z.new_empty(batch * heads, runs, call.columns)
    for part in range(call.tiles):
        linear_gradients.maps_kernel[(batch * heads, runs)](
            x, mapped.weight, call.tables.slot, d_z, d_x, d_weight, d_bias, strides(x), call.tables.strides[0], past,
            size, call.tables.chunks, runs, part, R=heads // x.shape[1], D=dim, BLOCK_D=block(dim), F=call.columns,
            BLOCK_F=call.block, **call.constants, **precision(x),
        )  # fmt: skip
    weight, bias = (d.unflatten(0, (batch, -1)).sum((0, 2)) for d in (d_weight, d_bias))
    return None, weight, None if mapped.bias is None else bias.to(mapped.bias.dtype)


def _gradient_sums(
    call: Call, queries: Mapped, inputs: tuple[Tensor, ...], factor: Tensor, outputs: tuple[Tensor, ...], runs: int
) -> Tensor:
    """The gradient of the folded sum that the run after each hands on, `[B H, runs, Q, V + 1]`."""
    (q, k, v), (d_y, delta, shift, normaliser, *_) = inputs, outputs
    batch, heads, tokens = q.shape[:3]
    sums = q.new_empty(batch * heads, runs, call.halves * call.columns, v.shape[-1] + 1, dtype=torch.float32)
    carries, phi = sums.new_empty(batch * heads, runs), pointer(queries.phi, q)
    carry.gradient_runs_kernel[(batch * heads, runs, call.parts)](
        q, phi, pointer(queries.weight, q), pointer(queries.bias, q), d_y, delta, normaliser, shift, factor,
        call.tables.slot, call.tables.keep, sums, carries, *(strides(x) for x in (q, phi, d_y)), *call.tables.strides,
        call.past, tokens, call.tables.chunks, runs, SHARED=call.spec.shared_shift, **call.constants, **call.features,
        **dims(k, v), **precision(q),
    )  # fmt: skip
    join(sums, carries, None, reverse=True)
    return sums
