# mypy: disable-error-code="no-untyped-def"
"""Parts of the window + linear kernel: where the key of a position is, feature maps, one block of a window's softmax.

A row (key, value or query) at a position of the current document is among the call's tokens, in the ring or among the
sinks. `rows` says where, a tuple: tokens, their stride, the list of live tokens, ring, sinks. `place`: (entry, origin,
ring's first position, its slots): positions from `entry` on are tokens of the call, number p + origin of the live ones;
earlier ones are in slot p - first of the ring, or in slot p modulo its slots where it is circular.

`CODE`: (map, has state, ragged, circular), of the whole call. Letters: S positions at a time, D a row's width, C
columns of a feature map's weight, F features.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.ops.triton.parts import softmax

SMALLEST = tl.constexpr(1e-12)  # of hedgehog's features (`ops/hedgehog.py`)
GAIN_LIMIT = tl.constexpr(15.0)  # of the gain's exponent (`window_linear/spec.py`)


@triton.jit
def window_edge(n, W: tl.constexpr, SLIDING: tl.constexpr):
    """The first position inside the window of a query at n (`window.fold_boundary`)."""
    if W == 0:
        edge = n
    elif SLIDING:
        edge = tl.maximum(n - W + 1, 0)
    else:
        edge = tl.maximum((n // W - 1) * W, 0)
    return edge


@triton.jit
def rows_at(p, want, rows, place, lane, SIZE: tl.constexpr, SINKS: tl.constexpr, CODE: tl.constexpr):
    """Rows of SIZE numbers at positions p `[S]` where `want`, zeros elsewhere: `[S, lanes]`, fp32."""
    entry, origin, first, slots = place
    x, x_stride, index, ring, sink = rows
    inside, lanes = (lane < SIZE)[None, :], lane[None, :]
    new = want & (p >= entry)
    token = p + origin
    if CODE[2]:
        token = tl.load(index + token, mask=new, other=0).to(tl.int32)
    values = tl.load(x + token[:, None] * x_stride + lanes, mask=new[:, None] & inside, other=0.0).to(tl.float32)
    if CODE[1]:
        old = want & (p < entry)
        if SINKS > 0:
            sunk = (old & (p < SINKS))[:, None] & inside
            values += tl.load(sink + p[:, None] * SIZE + lanes, mask=sunk, other=0.0).to(tl.float32)
            old = old & (p >= SINKS)
        slot = p % slots if CODE[3] else p - first
        in_ring = old[:, None] & inside
        values += tl.load(ring + slot[:, None] * SIZE + lanes, mask=in_ring, other=0.0).to(tl.float32)
    return values


@triton.jit
def row_at(p, rows, place, lane, SIZE: tl.constexpr, CODE: tl.constexpr):
    """One row, `[lanes]`."""
    one = p + tl.arange(0, 1)
    return tl.sum(rows_at(one, one >= 0, rows, place, lane, SIZE, 0, CODE), 0)


@triton.jit
def feature_lane(f, C: tl.constexpr, DOUBLE: tl.constexpr):
    """Which feature each lane holds, -1 for none; where `DOUBLE` a column's two features stand side by side."""
    column = f // 2 if DOUBLE else f
    feature = (f % 2) * C + column if DOUBLE else column
    return tl.where(column < C, feature, -1)


@triton.jit
def features(p, rows, place, maps, SIZES: tl.constexpr, CODE: tl.constexpr):
    """phi of the row at p, `[F]` in the order of `feature_lane`, 0 on lanes beyond.

    `maps`: a head's weight `[D, C]`, bias `[C]`, gain `[D]` and its shift; SIZES: D, C, and their blocks.
    """
    MAP: tl.constexpr = CODE[0]
    D: tl.constexpr = SIZES[0]
    C: tl.constexpr = SIZES[1]
    weight, bias, gain, shift = maps
    c, z, log_gain = tl.arange(0, SIZES[3]), tl.zeros((SIZES[3],), tl.float32), tl.zeros((), tl.float32)
    here = c < C
    if MAP == "elu":
        z = row_at(p, rows, place, c, D, CODE)
        return tl.where(here, tl.where(z > 0, z + 1, tl.exp(tl.minimum(z, 0.0))), 0.0)
    else:
        for begin in range(0, D, SIZES[2]):
            d = begin + tl.arange(0, SIZES[2])
            x = row_at(p, rows, place, d, D, CODE)
            inside = (d < D)[:, None] & here[None, :]
            w = tl.load(weight + d[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
            z += tl.sum(x[:, None] * w, 0)
            if MAP == "gain":
                log_gain += tl.sum(x * tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32), 0)
        if MAP == "t2r":
            z += tl.load(bias + c, mask=here, other=0.0).to(tl.float32)
            return tl.where(here, tl.maximum(z, 0.0), 0.0)
        elif MAP == "exp":
            most, least = tl.max(tl.where(here, z, -float("inf")), 0), tl.min(tl.where(here, z, float("inf")), 0)
            return tl.interleave(tl.where(here, tl.exp(z - most), 0.0), tl.where(here, tl.exp(least - z), 0.0))
        else:
            up, down = tl.maximum(softmax(z, here), SMALLEST), tl.maximum(softmax(-z, here), SMALLEST)
            phi = tl.interleave(tl.where(here, up, 0.0), tl.where(here, down, 0.0))
            if MAP == "gain":
                log_gain += tl.load(shift).to(tl.float32)
                phi *= tl.exp(tl.minimum(tl.maximum(log_gain, -GAIN_LIMIT), GAIN_LIMIT))
            return phi


@triton.jit
def tanh(x):
    """By its series near 0, where the quotient would cancel."""
    square, t = x * x, tl.exp(-2 * tl.abs(x))
    near = x * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
    far = (1 - t) / (1 + t)
    return tl.where(square < 0.0225, near, tl.where(x < 0, -far, far))


@triton.jit
def see(q, keys, values, want, most, total, y, scaling, softcap, HAS_CAP: tl.constexpr):
    """A window's largest score, normaliser and numerator with more keys `[S, D]` and values `[S, V]` where `want`."""
    s = tl.sum(keys * q[None, :], 1) * scaling
    if HAS_CAP:
        s = softcap * tanh(s / softcap)
    s = tl.where(want, s, -float("inf"))
    now = tl.maximum(most, tl.max(s, 0))
    shift = tl.where(now == -float("inf"), 0.0, now)
    p, before = tl.exp(s - shift), tl.exp(most - shift)
    return now, total * before + tl.sum(p, 0), y * before + tl.sum(p[:, None] * values, 0)


@triton.jit
def document(at, last, entry, origin, lowest, known, count):
    """What a token at position `at` (-1: dead) changes: is it alive, does it open a document; then the arguments after.

    `last`: position of the last live token; `lowest`, `known`: first positions of the document that a window, that
    sinks can have; `count`: live tokens so far.
    """
    live = at >= 0
    opens = live & ((at == 0) | (at != last + 1))
    last = tl.where(live, at, last)
    entry, lowest, known = tl.where(opens, at, entry), tl.where(opens, at, lowest), tl.where(opens, at, known)
    origin = tl.where(opens, count - at, origin)
    return live, opens, last, entry, origin, lowest, known, count + tl.where(live, 1, 0)


@triton.jit
def write_rows(
    out, rows, place, begin, stop, slot, lowest, highest, lane, SIZE: tl.constexpr, S: tl.constexpr,
    SINKS: tl.constexpr, CODE: tl.constexpr, CIRCLE: tl.constexpr
):  # fmt: skip
    """Rows of positions `begin` to `stop` into `out`: slot p + slot, or p modulo slots (`CIRCLE`); zeros for those
    that are not from `lowest` to `highest`."""
    for at in range(begin, stop, S):
        p = at + tl.arange(0, S)
        values = rows_at(p, (p >= lowest) & (p < tl.minimum(stop, highest)), rows, place, lane, SIZE, SINKS, CODE)
        to = p % place[3] if CIRCLE else p + slot
        tl.store(out + to[:, None] * SIZE + lane[None, :], values, mask=(p < stop)[:, None] & (lane < SIZE)[None, :])
