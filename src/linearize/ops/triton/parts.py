# mypy: disable-error-code="no-untyped-def"
"""What the kernels share: where a token stands, the convolution, elementwise functions. Triton types their arguments.

A convolution's past inputs are a list of slots packed in one int64, a byte each, the newest in the lowest byte: 0 for
none, 1 .. P for the taps given (oldest first), P + 1 + t for token t. Dead tokens are not pushed, a new document
empties the list.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(position, t, last, HAS_POSITION: tl.constexpr):
    """Whether token t is alive, whether it opens a document, and the position of the last live token (-1: none)."""
    live = tl.full((), 1, tl.int1)
    opens = tl.full((), 0, tl.int1)
    if HAS_POSITION:
        at = tl.load(position + t)
        live = at >= 0
        jumps = (last >= 0) & (at != last + 1)
        opens = live & ((at == 0) | jumps)
        last = tl.where(live, at, last)
    return live, opens, last


@triton.jit
def begin(state, state_out, cell, inside, commit, HAS_STATE: tl.constexpr):
    """The state before the first token; written where no token is to be in it."""
    S = tl.load(state + cell, mask=inside, other=0.0) if HAS_STATE else tl.zeros(cell.shape, tl.float32)
    if commit == 0:
        tl.store(state_out + cell, S, mask=inside)
    return S


@triton.jit
def log1p(u):
    """log(1 + u) for u in [0, 1] to fp32's rounding: 2 atanh(u / (2 + u)) by its series."""
    s = u / (2 + u)
    z = s * s
    series = 1 / 11 + z * (1 / 13 + z * (1 / 15 + z / 17))
    series = 1 + z * (1 / 3 + z * (1 / 5 + z * (1 / 7 + z * (1 / 9 + z * series))))
    return 2 * s * series


@triton.jit
def softplus(x):
    """log(1 + e^x)."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x * tl.sigmoid(x)


@triton.jit
def softmax(x, inside):
    """Of the lanes inside; 0 on the others."""
    x = tl.where(inside, x, -float("inf"))
    e = tl.exp(x - tl.max(x, 0))
    return e / tl.sum(e, 0)


@triton.jit
def first_slots(P: tl.constexpr, HAS_TAPS: tl.constexpr):
    """The list before the first token."""
    slots = tl.full((), 0, tl.int64)
    if HAS_TAPS:
        for s in tl.static_range(P):
            slots = (slots << 8) | (s + 1)
    return slots


@triton.jit
def push(slots, t, live, opens, P: tl.constexpr):
    """The list with token t in front."""
    pushed = (tl.where(opens, 0, slots) << 8) | (t + P + 1)
    return tl.where(live, pushed, slots)


@triton.jit
def at_slot(slots, lag, x, x_stride, column, taps, channel, lane, size, P, C, HAS_TAPS: tl.constexpr):
    """The input `lag` places back in the list, 0 for none.

    x: the row's first token, taps: its first past input `[P, C]`; `column`, `channel`: where in them; `lane < size`:
    which lanes there are.
    """
    slot = ((slots >> (8 * lag)) & 255).to(tl.int32)
    tap_value = tl.load(x + (slot - P - 1) * x_stride + column, mask=lane < tl.where(slot > P, size, 0), other=0.0)
    if HAS_TAPS:
        early = lane < tl.where((slot > 0) & (slot <= P), size, 0)
        tap_value += tl.load(taps + (slot - 1) * C + channel, mask=early, other=0.0)
    return tap_value


@triton.jit
def convolve(
    slots,
    x,
    x_stride,
    column,
    taps,
    channel,
    weight,
    bias,
    lane,
    size,
    P: tl.constexpr,
    C: tl.constexpr,
    HAS_TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """SiLU of the convolution at the newest slot, fp32; weight `[C, P + 1]`, bias `[C]`."""
    out = tl.zeros(lane.shape, tl.float32)
    if HAS_BIAS:
        out += tl.load(bias + channel, mask=lane < size, other=0.0).to(tl.float32)
    for lag in tl.static_range(P + 1):
        tap = tl.load(weight + channel * (P + 1) + P - lag, mask=lane < size, other=0.0).to(tl.float32)
        tap_value = at_slot(slots, lag, x, x_stride, column, taps, channel, lane, size, P, C, HAS_TAPS)
        out += tap * tap_value.to(tl.float32)
    return silu(out)


@triton.jit
def save_taps(
    slots, out, x, x_stride, column, taps, channel, lane, size, P: tl.constexpr, C: tl.constexpr, HAS_TAPS: tl.constexpr
):
    """Write the P newest inputs of the list, oldest first, to the row's `out: [P, C]`."""
    for s in tl.static_range(P):
        tap_value = at_slot(slots, P - 1 - s, x, x_stride, column, taps, channel, lane, size, P, C, HAS_TAPS)
        tl.store(out + s * C + channel, tap_value, mask=lane < size)


@triton.jit
def gate_and_norm(y, gate, weight, inside, size, eps, GATE_FIRST: tl.constexpr):
    """RMS norm of y silu(gate) (`GATE_FIRST`: Mamba-2), or of y and then the gate (Gated DeltaNet); times weight."""
    y = y * silu(gate) if GATE_FIRST else y
    y = tl.where(inside, y, 0.0)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / size + eps) * weight
    return y if GATE_FIRST else y * silu(gate)
