"""Window + linear attention in linear time and memory: chunks of queries against two chunks of keys and one folded sum.

After `align`, chunk n attends to chunks n - 1 and n of its document directly (inside the window by softmax, beyond it
by features) and
to everything before them through the sum. With terraced windows and chunks of one block nothing in the tile lies
beyond the window.

Letters: B batch, G key/value heads, H query heads, T new tokens, N chunks, C chunk, J sinks, K = J + 2 C keys of a
tile, D, V, F.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.window_linear.align import Alignment, align
from linearize.ops.window_linear.slab import Slab, attend_slab
from linearize.ops.window_linear.spec import WindowLinear
from linearize.ops.window_linear.state import WindowLinearState
from linearize.ops.window_linear.update import Slots, gather_slots, next_state, pad_slots, take_slots
from linearize.ops.window_linear.window import in_window

SMALLEST_CHUNK = 16
SLAB = 1 << 19  # numbers per matrix of scores or features: a few of them fit a processor's last-level cache


def chunk_size(spec: WindowLinear) -> int:
    """Tokens per chunk: whole blocks of a terraced window, at least the reach of a sliding one."""
    if spec.window == 0:
        return 64
    return spec.window * -(-SMALLEST_CHUNK // spec.window)


def chunked(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTV: Tensor,
    *,
    spec: WindowLinear,
    layout: Layout,
    state: WindowLinearState | None = None,
    need_state: bool = True,
) -> tuple[Tensor, WindowLinearState | None]:
    """Attend; same arguments, outputs and values as `reference`, time and memory linear in T."""
    slots = gather_slots(k_BGTD, v_BGTV, layout, state, spec)
    chunk = chunk_size(spec)
    alignment = align(slots, layout, chunk, spec)
    q = alignment.gather_queries(q_BHTD, chunk).transpose(1, 2)  # [B, N, H, C, D]
    k = alignment.gather(slots.k_BGSD, chunk).transpose(1, 2)
    v = alignment.gather(slots.v_BGSV, chunk).transpose(1, 2)
    sinks = None
    if spec.num_sinks and spec.has_window:
        sinks = sinks_of(slots, alignment, state, spec)
    memory = None if state is None else state.memory_BHFV
    y_BHAV = _attend(q, k, v, sinks, memory, _masks(alignment, slots, layout, chunk, spec), spec).flatten(2, 3)
    return alignment.scatter(y_BHAV, q_BHTD.shape[2]), next_state(slots, layout, state, spec) if need_state else None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: tuple[Tensor, ...] | None,
    memory_BHFV: Tensor | None,
    masks: Slab,
    spec: WindowLinear,
) -> Tensor:
    """Slab after slab, each with the two chunks before it and the memory of all others."""
    step = _slab_chunks(q)
    log_g = q.new_zeros(q.shape[2]) if spec.log_window_factor_H is None else spec.log_window_factor_H.to(q.dtype)
    memory = None if memory_BHFV is None else memory_BHFV.to(q.dtype).mT
    k_before, v_before = (x.new_zeros(x.shape[0], 2, *x.shape[2:]) for x in (k, v))
    ys = []
    for i, parts in enumerate(zip(*(x.split(step, dim=1) for x in (q, k, v, *(sinks or ()))), strict=True)):
        q_part, k_part, v_part, *sink_parts = parts
        q_part = q_part.contiguous()
        k_part, v_part = torch.cat([k_before, k_part], dim=1), torch.cat([v_before, v_part], dim=1)
        k_before, v_before = k_part[:, -2:], v_part[:, -2:]
        slab, phi = masks.part(slice(i * step, i * step + q_part.shape[1])), None
        if spec.has_linear:
            phi = spec.features_q(q_part), spec.features_k(k_part if slab.far is not None else k_part[:, :-2])
            if memory is None:
                memory = q.new_zeros(q.shape[0], q.shape[2], v.shape[-1] + 1, phi[0].shape[-1])
        y, memory = attend_slab(q_part, k_part, v_part, sink_parts, phi, memory, log_g, slab)
        ys.append(y)
    return ys[0] if len(ys) == 1 else torch.cat(ys, dim=2)


def _slab_chunks(q_BNHCD: Tensor) -> int:
    """Chunks per slab: a matrix of scores or features of a slab has about `SLAB` numbers."""
    batch, _, heads, chunk = q_BNHCD.shape[:4]
    return max(1, SLAB // (batch * heads * chunk * max(2 * chunk, 64)))


def sinks_of(
    slots: Slots, alignment: Alignment, state: WindowLinearState | None, spec: WindowLinear
) -> tuple[Tensor, ...]:
    """Keys and values of the first tokens of each chunk's document, `[B, N, G, J, D]` and `[B, N, G, J, V]`."""
    old = (None, None) if state is None else (state.sink_k_BGND, state.sink_v_BGNV)
    pairs = zip((slots.k_BGSD, slots.v_BGSV), old, strict=True)
    return tuple(_sinks(x, old_x, slots, alignment, spec) for x, old_x in pairs)


def _sinks(x_BGSD: Tensor, old_BGJD: Tensor | None, slots: Slots, alignment: Alignment, spec: WindowLinear) -> Tensor:
    """One of `sinks_of`: from the state where it holds them, else from the slots."""
    batch, j = x_BGSD.shape[0], torch.arange(spec.num_sinks, device=x_BGSD.device)
    index = spec.num_sinks + alignment.origin_BN[..., None] + j
    old = x_BGSD.new_zeros(*x_BGSD.shape[:2], spec.num_sinks, x_BGSD.shape[3])
    if old_BGJD is not None:
        old = pad_slots(old_BGJD, spec).to(x_BGSD.dtype)
        origin = slots.carried_origin[..., None]
        held = (alignment.origin_BN[..., None] == origin) & (j < slots.num_past - origin)
        index = torch.where(held, j, index)
    taken = take_slots(torch.cat([old, x_BGSD], dim=2), index.flatten(1).expand(batch, -1))
    return taken.unflatten(2, (-1, spec.num_sinks)).transpose(1, 2)


def _masks(alignment: Alignment, slots: Slots, layout: Layout, chunk: int, spec: WindowLinear) -> Slab:
    """What the queries of each chunk see; computed once for all layers that share layout and window."""
    memo = ("masks", chunk, spec.window, spec.shape, spec.num_sinks, spec.branch, spec.has_linear, slots.k_BGSD.dtype)
    if slots.num_past == 0 and memo in layout.memo:
        found = layout.memo[memo]
        assert isinstance(found, Slab)
        return replace(found, scaling=spec.scaling, softcap=spec.softcap, shared_shift=spec.shared_shift)
    c = torch.arange(-chunk, chunk, device=slots.position.device)
    first = alignment.first_BN[..., None]
    query, key = (first + c[chunk:])[..., None], (first + c)[..., None, :]
    live = (alignment.follows_BN[..., None] | (c >= 0))[..., None, :] & (key >= spec.num_sinks)
    if alignment.source_BA is not None and not alignment.whole:
        held = (alignment.source_BA >= 0).unflatten(1, (-1, chunk))
        before = torch.nn.functional.pad(held[:, :-1], (0, 0, 1, 0))
        live = live & torch.cat([before, held], dim=-1)[:, :, None]
    seen = live & (key <= query)
    near = in_window(query, key, spec.window, spec.shape)
    one_block = spec.shape == "terraced" and chunk == spec.window
    far = None if one_block or not spec.has_linear else (seen & ~near)[:, :, None]
    hidden = None
    if spec.has_window:
        shown = seen & near
        if spec.num_sinks:
            sink = torch.arange(spec.num_sinks, device=c.device)
            early = sink <= query
            if alignment.begin_BN is not None:
                early = early & (sink >= alignment.begin_BN[..., None, None])
            shown = torch.cat([early.expand(*shown.shape[:-1], -1), shown], dim=-1)
        hidden = ~shown[:, :, None]
    dtype = slots.k_BGSD.dtype
    keep = torch.cat([alignment.carried_B1, alignment.follows_BN[:, 1:]], dim=1)
    fold = _foldable(alignment, chunk, spec).to(dtype)[:, :, None, None]
    opens = None if bool(keep.all()) else keep.to(dtype)[:, :, None, None, None]
    result = Slab(hidden, far, fold, opens, spec.scaling, spec.softcap, spec.shared_shift)
    if slots.num_past == 0:
        layout.memo[memo] = result
    return result


def _foldable(alignment: Alignment, chunk: int, spec: WindowLinear) -> Tensor:
    """Which tokens of chunk n - 2 enter the sum before chunk n, `[B or 1, N, C]`: its document's, but for sinks."""
    position = alignment.first_BN[..., None] + torch.arange(chunk, device=alignment.first_BN.device)
    fold = position >= spec.num_sinks
    if alignment.source_BA is not None:
        fold = fold & (alignment.source_BA >= 0).unflatten(1, (-1, chunk))
    same = alignment.follows_BN[:, 2:] & alignment.follows_BN[:, 1:-1]
    return torch.nn.functional.pad(fold[:, :-2] & same[..., None], (0, 0, 2, 0))[:, : alignment.num_chunks]
