"""`window_linear_steps`: window + linear attention over a few tokens, by one launch of `window_step.py`.

Letters: B batch, H query heads, G key/value heads, T tokens, U of them (the last) with an output, D head dimension, V
value dimension, C columns of a feature map's weight, F features, R ring slots, N sinks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.triton.launch import Span, power_of_two, rows_of
from linearize.ops.triton.launch import tile as make_tile
from linearize.ops.triton.window_step import window_kernel
from linearize.ops.window_linear.spec import (
    DOUBLED,
    FeatureWeights,
    WindowLinear,
    fold_boundary,
    ring_slots,
    weights_of,
)
from linearize.ops.window_linear.state import WindowBuffers, WindowLinearState

BLOCK_NUMBERS = 4096  # of keys, or values, that a program looks at together
MAP_NUMBERS = 8192  # of a feature map's weight
FEWEST_WARPS = 4
State = WindowLinearState | WindowBuffers


@dataclass(frozen=True, eq=False, kw_only=True)
class Rows:
    """Ring of k and v, sinks of k and v; each `[B, G, slots, .]`."""

    k: Tensor
    v: Tensor
    sink_k: Tensor
    sink_v: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the kernel's order."""
        return self.k, self.v, self.sink_k, self.sink_v


def window_linear_steps(
    q_BHUD: Tensor,
    k_BGTD: Tensor,
    v_BGTV: Tensor,
    *,
    spec: WindowLinear,
    layout: Layout,
    state: State | None = None,
    need_state: bool = True,
    commit: int | None = None,
) -> tuple[Tensor, Any]:
    """`window_linear`'s backend: `y: [B, H, U, V]` in the dtype of q, and the state after `commit` tokens (None: all).

    A `WindowBuffers` is written in place and returned: nothing is copied to or from the host, so that the call can be
    captured. With a plain layout its own cursor then says where the tokens stand; a document may begin in such a call
    only before the first token that has an output.
    """
    batch, tokens = k_BGTD.shape[0], k_BGTD.shape[2]
    span = Span.of(tokens, q_BHUD.shape[2], commit)
    writes = need_state and span.commit > 0
    in_place = isinstance(state, WindowBuffers)
    position = _positions(layout, state, tokens, batch, k_BGTD.device)
    q, k, v = rows_of(q_BHUD), rows_of(k_BGTD), rows_of(v_BGTV)
    old = _old_rows(state, k, v)
    out, (following, begin) = old, torch.empty(2, batch, dtype=torch.int64, device=k.device)
    cursor, begins = _cursor(state, layout)
    own = state.next_B if isinstance(state, WindowBuffers) else None
    apart = own is not None and cursor is not own  # then no program reads where another one writes
    following = own if own is not None and apart else following
    if writes and not in_place:
        out = _new_rows(state, spec, span, position is None, k, v)
    if in_place and writes:
        assert out.k.shape[2] >= ring_slots(spec.window, spec.shape) + span.commit, f"{span.commit} tokens at once"
    y = torch.empty(batch, q.shape[1], span.outputs, v.shape[3], dtype=q.dtype, device=q.device)
    cursors = (cursor, begins, following, begin)
    memory = _launch(q, k, v, y, spec, layout, state, span, writes, position, old, out, cursors)
    if not writes:
        return y, state if need_state else None
    if isinstance(state, WindowBuffers):
        if not apart:
            state.next_B.copy_(following)
        if position is not None and layout.tail is None:  # else no document opens
            state.begin_B.copy_(begin)
        return y, state
    sink_k, sink_v = (out.sink_k, out.sink_v) if spec.num_sinks else (None, None)
    if position is None:
        return y, WindowLinearState(_next_of(state) + span.commit, out.k, out.v, memory, sink_k, sink_v)
    return y, WindowLinearState(following, out.k, out.v, memory, sink_k, sink_v, begin)


def _next_of(state: WindowLinearState | None) -> int:
    """Where the first token stands in a plain call; -1: not in the same place in every row."""
    following = 0 if state is None else state.next
    return following if isinstance(following, int) else -1


def _positions(layout: Layout, state: Any, tokens: int, rows: int, device: torch.device) -> Tensor | None:
    """`[B, T]`; None where the tokens of every row follow the state, or begin at position 0 without one."""
    if isinstance(state, WindowBuffers) and layout.tail == 0:
        return None
    if layout.is_plain and (isinstance(state, WindowBuffers) or _next_of(state) == layout.start):
        return None
    return layout.positions(tokens, device).expand(rows, -1).contiguous()


def _live_first(layout: Layout, position_BT: Tensor) -> Tensor:
    """`Layout.live_first` of every row."""
    if layout.position_BT is not None and layout.position_BT.shape == position_BT.shape:
        return layout.live_first()
    return (position_BT < 0).long().argsort(dim=1, stable=True)


def _old_rows(state: Any, k: Tensor, v: Tensor) -> Rows:
    """Those of a state; none of either without one."""
    if state is None:
        return Rows(k=k[:, :, :0], v=v[:, :, :0], sink_k=k[:, :, :0], sink_v=v[:, :, :0])
    if isinstance(state, WindowBuffers):
        buffers = Rows(k=state.k_BGCD, v=state.v_BGCV, sink_k=state.sink_k_BGND, sink_v=state.sink_v_BGNV)
        assert all(x.is_contiguous() for x in buffers.tensors), "buffers are written in place"
        return buffers
    k, v, has_sinks = state.k_BGRD, state.v_BGRV, state.sink_k_BGND is not None
    sinks = (state.sink_k_BGND, state.sink_v_BGNV) if has_sinks else (k[:, :, :0], v[:, :, :0])
    return Rows(k=k.contiguous(), v=v.contiguous(), sink_k=sinks[0].contiguous(), sink_v=sinks[1].contiguous())


def _new_rows(state: Any, spec: WindowLinear, span: Span, plain: bool, k: Tensor, v: Tensor) -> Rows:
    """Memory for ring and sinks: of as many as wait after a plain call, of as many as may wait after a ragged one."""
    slots, sinks = ring_slots(spec.window, spec.shape), spec.num_sinks
    if plain:
        following = _next_of(state) + span.commit
        slots, sinks = following - fold_boundary(following, spec.window, spec.shape), min(sinks, following)
    slots = min(slots, span.commit + (0 if state is None else state.k_BGRD.shape[2]))

    def empty(x: Tensor, size: int) -> Tensor:
        return torch.empty(*x.shape[:2], size, x.shape[3], dtype=x.dtype, device=x.device)

    return Rows(k=empty(k, slots), v=empty(v, slots), sink_k=empty(k, sinks), sink_v=empty(v, sinks))


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    spec: WindowLinear,
    layout: Layout,
    state: State | None,
    span: Span,
    writes: bool,
    position: Tensor | None,
    old: Rows,
    out: Rows,
    cursors: tuple[int | Tensor, Tensor | None, Tensor, Tensor],
) -> Tensor | None:
    """Run the kernel; the folded sums after it (None without any)."""
    (batch, heads, _, dim), value_dim = q.shape, v.shape[3]
    folds = spec.feature_k is not None and (spec.has_linear or writes)
    map_q, map_k = (weights_of(f) if folds else None for f in (spec.feature_q, spec.feature_k))
    sizes = _sizes(map_k, dim)
    features = sizes[1] * (2 if map_k is not None and map_k.name in DOUBLED else 1)
    memory = _memory(state, folds)
    after = memory
    if folds and writes and not isinstance(state, WindowBuffers):
        after = torch.empty(batch, heads, features, value_dim + 1, dtype=torch.float32, device=q.device)
    cursor, begin, *cursor_out = cursors
    start, following = cursor if isinstance(cursor, int) else 0, cursor_out[0]
    block_f = sizes[3] * (2 if map_k is not None and map_k.name in DOUBLED else 1)
    tile = make_tile(block_f, value_dim)
    seen = spec.window if spec.shape == "sliding" else 2 * spec.window
    block_s = min(power_of_two(max(seen, 1)), max(1, BLOCK_NUMBERS // max(power_of_two(dim), tile.value)))
    factors = (spec.log_window_factor_H, spec.linear_factor_H)
    window_kernel[(batch * heads,)](
        q,
        k,
        v,
        following if position is None else _live_first(layout, position),
        following if position is None else position,
        (cursor if isinstance(cursor, Tensor) else following, following if begin is None else begin),
        tuple(cursor_out),
        old.tensors,
        out.tensors,
        y if memory is None else memory,
        y if after is None else after,
        *(tuple(y if w is None else w.contiguous() for w in _tensors(m)) for m in (map_q, map_k)),
        *(y if w is None else w.contiguous() for w in factors),
        y,
        q.stride()[:3],
        k.stride()[:3],
        v.stride()[:3],
        span.tokens,
        span.first,
        span.commit,
        start,
        old.k.shape[2],
        out.k.shape[2],
        old.sink_k.shape[2],
        out.sink_k.shape[2],
        float(spec.scaling),
        float(spec.softcap or 1.0),
        HEADS=(heads, heads // k.shape[1]),
        SIZES=sizes,
        V=value_dim,
        BLOCKS=(block_s, power_of_two(dim), block_f, tile.value, power_of_two(value_dim)),
        WINDOW=(spec.window, spec.shape == "sliding", spec.num_sinks),
        BRANCH=(spec.has_window, spec.has_linear, spec.shared_shift),
        CODE=(map_k.name if map_k else "", state is not None, position is not None, isinstance(state, WindowBuffers)),
        CURSOR=isinstance(cursor, Tensor),
        BEGINS=begin is not None,
        FACTORS=(*(w is not None for w in factors), spec.softcap is not None, spec.logits),
        NEED_STATE=writes,
        num_warps=max(tile.warps, FEWEST_WARPS),
    )
    return after


def _cursor(state: State | None, layout: Layout) -> tuple[int | Tensor, Tensor | None]:
    """The position that comes next (where a static layout tells it, in memory that the kernel only reads), and that of
    the document's first token (None: 0)."""
    if isinstance(state, WindowBuffers):
        return state.next_B if layout.tail is None else layout.following(), state.begin_B
    return (0, None) if state is None else (state.next, state.begin)


def _tensors(weights: FeatureWeights | None) -> tuple[Tensor | None, ...]:
    return (None,) * 4 if weights is None else weights.tensors


def _memory(state: State | None, folds: bool) -> Tensor | None:
    """The sums before the call as the kernel reads them."""
    if state is None or not folds:
        return None
    memory = state.memory_BHFV
    assert memory is not None
    if isinstance(state, WindowBuffers):
        assert memory.dtype == torch.float32 and memory.is_contiguous()
    return memory.to(torch.float32).contiguous()


def _sizes(weights: FeatureWeights | None, dim: int) -> tuple[int, int, int, int]:
    """D, C and how many of them a program looks at together in a feature map."""
    columns = 1 if weights is None else dim if weights.weight_HDC is None else weights.weight_HDC.shape[2]
    block = power_of_two(columns)
    return dim, columns, min(power_of_two(dim), max(1, MAP_NUMBERS // block)), block
