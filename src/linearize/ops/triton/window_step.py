# mypy: disable-error-code="no-untyped-def"
"""Window + linear attention over a few tokens in one launch: the equation of `window_linear/reference.py`.

A program is one query head of one row and goes through the tokens in order: a query sees its window by softmax, in
blocks counted from the window's edge, and the folded sums M, z by its features; then what leaves the window of the next
token is folded, one token after the other. So no bit depends on where a text is cut. Keys and values are read where
they are, by every query head of their group; M is read once and written once.

Letters: B batch, H query heads, G key/value heads, R heads of a group, T tokens, U of them (the last) with an output,
D head dimension, V value dimension, C columns of a feature map's weight, F features, N sinks, W window.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.ops.triton.window_parts import (
    document,
    feature_lane,
    features,
    row_at,
    rows_at,
    see,
    window_edge,
    write_rows,
)


@triton.jit
def fold(p, stop, M, z, k_rows, v_rows, place, maps, value, SIZES: tl.constexpr, V: tl.constexpr, CODE: tl.constexpr):
    """M and z with the tokens of positions p to `stop`."""
    for at in range(p, stop):
        phi = features(at, k_rows, place, maps, SIZES, CODE)
        M += phi[:, None] * row_at(at, v_rows, place, value, V, CODE)[None, :]
        z += phi
    return M, z


@triton.jit
def attend(
    q, n, lowest, known, live, k_rows, v_rows, place, d, value, scaling, softcap,
    SIZES: tl.constexpr, V: tl.constexpr, S: tl.constexpr, WINDOW: tl.constexpr, BRANCH: tl.constexpr,
    CODE: tl.constexpr, HAS_CAP: tl.constexpr
):  # fmt: skip
    """Largest score, normaliser and numerator of a query's window; q: its row `[D]`, n: its position."""
    y, total = tl.zeros(value.shape, tl.float32), tl.zeros((), tl.float32)
    most = tl.full((), 0.0 if BRANCH[2] else -float("inf"), tl.float32)
    if BRANCH[0]:
        low = tl.maximum(window_edge(n, WINDOW[0], WINDOW[1]), lowest)
        if WINDOW[2] > 0:
            stop = tl.where(live, tl.minimum(low, WINDOW[2]), 0)
            for at in range(known, stop, S):
                p = at + tl.arange(0, S)
                keys = rows_at(p, p < stop, k_rows, place, d, SIZES[0], WINDOW[2], CODE)
                values = rows_at(p, p < stop, v_rows, place, value, V, WINDOW[2], CODE)
                most, total, y = see(q, keys, values, p < stop, most, total, y, scaling, softcap, HAS_CAP)
        for at in range(low, tl.where(live, n + 1, low), S):
            p = at + tl.arange(0, S)
            keys = rows_at(p, p <= n, k_rows, place, d, SIZES[0], WINDOW[2], CODE)
            values = rows_at(p, p <= n, v_rows, place, value, V, WINDOW[2], CODE)
            most, total, y = see(q, keys, values, p <= n, most, total, y, scaling, softcap, HAS_CAP)
    return most, total, y


@triton.jit
def window_factor(log_g, head, FACTORS: tl.constexpr):
    """g of a head."""
    x = tl.load(log_g + head).to(tl.float32)
    return 1 / (1 + tl.exp(-x)) if FACTORS[3] else tl.exp(x)


@triton.jit
def linear_factor(factor, head, FACTORS: tl.constexpr):
    """The factor of a head's linear term."""
    x = tl.load(factor + head).to(tl.float32)
    return 1 / (1 + tl.exp(x)) if FACTORS[3] else x


@triton.jit
def run_block(
    value, row, b, head, q_rows, k_rows, v_rows, maps_q, maps_k, position, memory, memory_out, y, log_g, factor,
    tokens, first, commit, begin, known, slots, scaling, softcap, last_block,
    SIZES: tl.constexpr, V: tl.constexpr, BLOCKS: tl.constexpr, WINDOW: tl.constexpr, BRANCH: tl.constexpr,
    CODE: tl.constexpr, FACTORS: tl.constexpr, NEED_STATE: tl.constexpr
):  # fmt: skip
    """All tokens of one head for some of its values."""
    DOUBLE: tl.constexpr = (CODE[0] == "hedgehog") or (CODE[0] == "exp") or (CODE[0] == "gain")
    F: tl.constexpr = SIZES[1] * (2 if DOUBLE else 1)
    W: tl.constexpr = WINDOW[0]
    lane, d = feature_lane(tl.arange(0, BLOCKS[2]), SIZES[1], DOUBLE), tl.arange(0, BLOCKS[1])
    at_z = (row * F + lane) * (V + 1) + V
    at_M = ((row * F + lane) * (V + 1))[:, None] + value[None, :]
    inside = (lane >= 0)[:, None] & (value < V)[None, :]
    M, z = tl.zeros((BLOCKS[2], BLOCKS[3]), tl.float32), tl.zeros((BLOCKS[2],), tl.float32)
    if CODE[1] and CODE[0] != "":
        M = tl.load(memory + at_M, mask=inside, other=0.0)
        z = tl.load(memory + at_z, mask=lane >= 0, other=0.0)
    entry, origin, count = begin, -begin, begin * 0
    last = begin - 1 if CODE[1] else begin * 0 - 2
    lowest = tl.maximum(tl.maximum(window_edge(begin, W, WINDOW[1]), begin - slots), known)
    folded, ring_first = lowest, begin - slots
    for t in range(0, tokens):
        at = tl.load(position + b * tokens + t).to(tl.int32) if CODE[2] else begin + t
        live, opens, last, entry, origin, lowest, known, count = document(at, last, entry, origin, lowest, known, count)
        place = (entry, origin, ring_first, slots)
        M, z, folded = tl.where(opens, 0.0, M), tl.where(opens, 0.0, z), tl.where(opens, at, folded)
        needs_fold = live if W == 0 else t + 1 < tokens
        if NEED_STATE:
            needs_fold = needs_fold | (t + 1 == commit)
        leave = tl.where(needs_fold, window_edge(last + 1, W, WINDOW[1]), 0)
        if CODE[0] != "" and W == 0:  # the token itself is beyond the window
            M, z = fold(folded, leave, M, z, k_rows, v_rows, place, maps_k, value, SIZES, V, CODE)
        if t >= first:
            q_place = (0, 0, 0, 1)
            q = row_at(t - first, q_rows, q_place, d, SIZES[0], ("", False, False, False))
            most, total, out = attend(
                q, at, lowest, known, live, k_rows, v_rows, place, d, value, scaling, softcap,
                SIZES, V, BLOCKS[0], WINDOW, BRANCH, CODE, FACTORS[2]
            )  # fmt: skip
            weight = window_factor(log_g, head, FACTORS) if FACTORS[0] else 1.0
            total, out = total * weight, out * weight
            if BRANCH[1]:
                phi = features(t - first, q_rows, q_place, maps_q, SIZES, (CODE[0], False, False, False))
                phi *= linear_factor(factor, head, FACTORS) if FACTORS[1] else 1.0
                phi *= tl.exp(-most) if BRANCH[2] else 1.0
                total, out = total + tl.sum(phi * z, 0), out + tl.sum(phi[:, None] * M, 0)
            out = tl.where(live, out / tl.where(total == 0, 1.0, total), 0.0)
            tl.store(y + (row * (tokens - first) + t - first) * V + value, out, mask=value < V)
        if CODE[0] != "" and W > 0:
            M, z = fold(
                tl.maximum(folded, WINDOW[2]), leave, M, z, k_rows, v_rows, place, maps_k, value, SIZES, V, CODE
            )
        folded = tl.maximum(folded, leave)
        if NEED_STATE and CODE[0] != "":  # noqa: SIM102  (a constant of the build, then a value)
            if t + 1 == commit:
                tl.store(memory_out + at_M, M, mask=inside)
                tl.store(memory_out + at_z, z, mask=(lane >= 0) & last_block)


@triton.jit
def keep(
    b, position, k_rows, v_rows, out, cursor_out, tokens, commit, begin, known, slots, slots_out, sinks_out,
    D: tl.constexpr, V: tl.constexpr, BLOCKS: tl.constexpr, WINDOW: tl.constexpr, CODE: tl.constexpr
):  # fmt: skip
    """Ring and sinks after `commit` tokens into `out`; the position that comes next, and its document's first."""
    S: tl.constexpr = BLOCKS[0]
    N: tl.constexpr = WINDOW[2]
    entry, origin, count = begin, -begin, begin * 0
    last = begin - 1 if CODE[1] else begin * 0 - 2
    lowest = tl.maximum(tl.maximum(window_edge(begin, WINDOW[0], WINDOW[1]), begin - slots), known)
    ring_first = begin - slots
    for t in range(0, commit):
        at = tl.load(position + b * tokens + t).to(tl.int32) if CODE[2] else begin + t
        _, _, last, entry, origin, lowest, known, count = document(at, last, entry, origin, lowest, known, count)
    following = tl.maximum(last + 1, 0)
    place, edge = (entry, origin, ring_first, slots), window_edge(following, WINDOW[0], WINDOW[1])
    tl.store(cursor_out[0] + b, following.to(tl.int64))
    tl.store(cursor_out[1] + b, known.to(tl.int64))
    d, value = tl.arange(0, BLOCKS[1]), tl.arange(0, BLOCKS[4])
    low = tl.maximum(lowest, edge)
    if CODE[3]:
        begin_ring, stop, begin_sink, stop_sink = tl.maximum(entry, edge), following, entry, tl.minimum(following, N)
    else:
        begin_ring, stop, begin_sink, stop_sink = following - slots_out, following, following * 0, sinks_out
    write_rows(out[0], k_rows, place, begin_ring, stop, -begin_ring, low, stop, d, D, S, N, CODE, CODE[3])
    write_rows(out[1], v_rows, place, begin_ring, stop, -begin_ring, low, stop, value, V, S, N, CODE, CODE[3])
    if N > 0:
        write_rows(out[2], k_rows, place, begin_sink, stop_sink, 0, known, following, d, D, S, N, CODE, False)
        write_rows(out[3], v_rows, place, begin_sink, stop_sink, 0, known, following, value, V, S, N, CODE, False)


@triton.jit(do_not_specialize=["tokens", "first", "commit", "start", "slots", "slots_out", "sinks", "sinks_out"])
def window_kernel(
    q,
    k,
    v,
    index,  # [B, T]: the live tokens in their order, where ragged
    position,  # [B, T], where ragged
    cursor,  # [B]: the state's `next`, where CURSOR, and its `begin`, where BEGINS
    cursor_out,
    old,  # ring of k and v, sinks of k and v
    out,
    memory,
    memory_out,
    maps_q,  # weight, bias, gain, shift
    maps_k,
    log_g,
    factor,
    y,
    q_strides,  # of batch, head and token, as the next
    k_strides,
    v_strides,
    tokens,
    first,
    commit,
    start,  # where not CURSOR: the state's `next`, without a state the first position
    slots,  # of the ring
    slots_out,
    sinks,
    sinks_out,
    scaling,
    softcap,
    HEADS: tl.constexpr,  # H, R
    SIZES: tl.constexpr,  # D, C and their blocks in a feature map
    V: tl.constexpr,
    BLOCKS: tl.constexpr,  # S, D, F, values at a time, all values
    WINDOW: tl.constexpr,  # W, whether sliding, N
    BRANCH: tl.constexpr,  # whether the window and the linear term are seen, and both shifted
    CODE: tl.constexpr,  # feature map ("": none), has state, ragged, circular and in place
    CURSOR: tl.constexpr,
    BEGINS: tl.constexpr,
    FACTORS: tl.constexpr,  # whether there are log_g, factor, softcap; whether the first two are logits
    NEED_STATE: tl.constexpr,
):
    """One program: one query head of one row. The first head of a group writes the group's ring and sinks."""
    D: tl.constexpr = SIZES[0]
    C: tl.constexpr = SIZES[1]
    G: tl.constexpr = HEADS[0] // HEADS[1]
    row = tl.program_id(0).to(tl.int64)
    b, h = row // HEADS[0], row % HEADS[0]
    g, live = h // HEADS[1], index + b * tokens
    group = b * G + g
    begin = (tl.load(cursor[0] + b) if CURSOR else start + tl.zeros((), tl.int32)).to(tl.int32)
    known = tl.load(cursor[1] + b).to(tl.int32) if BEGINS else begin * 0
    k_ring, k_sink = old[0] + group * slots * D, old[2] + group * sinks * D
    v_ring, v_sink = old[1] + group * slots * V, old[3] + group * sinks * V
    k_rows = (k + b * k_strides[0] + g * k_strides[1], k_strides[2], live, k_ring, k_sink)
    v_rows = (v + b * v_strides[0] + g * v_strides[1], v_strides[2], live, v_ring, v_sink)
    q_rows = (q + b * q_strides[0] + h * q_strides[1], q_strides[2], index, k_ring, k_sink)
    own_q = (maps_q[0] + h * D * C, maps_q[1] + h * C, maps_q[2] + h * D, maps_q[3] + h)
    own_k = (maps_k[0] + h * D * C, maps_k[1] + h * C, maps_k[2] + h * D, maps_k[3] + h)
    for first_value in range(0, V, BLOCKS[3]):
        value, last_block = first_value + tl.arange(0, BLOCKS[3]), first_value + BLOCKS[3] >= V
        run_block(
            value, row, b, h, q_rows, k_rows, v_rows, own_q, own_k, position, memory, memory_out, y, log_g, factor,
            tokens, first, commit, begin, known, slots, scaling, softcap, last_block,
            SIZES, V, BLOCKS, WINDOW, BRANCH, CODE, FACTORS, NEED_STATE
        )  # fmt: skip
    if NEED_STATE:  # noqa: SIM102
        if h % HEADS[1] == 0:
            k_out, k_sunk = out[0] + group * slots_out * D, out[2] + group * sinks_out * D
            v_out, v_sunk = out[1] + group * slots_out * V, out[3] + group * sinks_out * V
            keep(
                b, position, k_rows, v_rows, (k_out, v_out, k_sunk, v_sunk), cursor_out, tokens, commit, begin,
                known, slots, slots_out, sinks_out, D, V, BLOCKS, WINDOW, CODE
            )  # fmt: skip
