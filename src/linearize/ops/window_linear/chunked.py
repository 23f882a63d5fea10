"""Window + linear attention in linear time and memory: chunks of queries against two chunks of keys and one folded sum.

After `align`, chunk n attends to chunks n - 1 and n of its document directly (inside the window by softmax, beyond it
by features) and
to everything before them through the sum. With terraced windows and chunks of one block nothing in the tile lies
beyond the window.

Letters: B batch, G key/value heads, H query heads, T new tokens, N chunks, C chunk, J sinks, K = J + 2 C keys of a
tile, D, V, F.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.window_linear.align import Alignment, align
from linearize.ops.window_linear.spec import WindowLinear, divide, state_dtype, with_ones
from linearize.ops.window_linear.state import WindowLinearState
from linearize.ops.window_linear.tile import chunk_memories, window_tiles
from linearize.ops.window_linear.update import Slots, gather_slots, next_state, pad_slots, take_slots
from linearize.ops.window_linear.window import in_window

SMALLEST_CHUNK = 16


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
    hidden_BN1CK, far_BN1CK = _masks(alignment, slots, layout, chunk, spec)
    q = alignment.gather_queries(q_BHTD, chunk).transpose(1, 2).contiguous()  # [B, N, H, C, D]
    k = alignment.gather(slots.k_BGSD, chunk).transpose(1, 2)
    v = with_ones(alignment.gather(slots.v_BGSV, chunk).transpose(1, 2))
    dtype = state_dtype(q_BHTD)
    total, scale = torch.zeros((), dtype=dtype, device=q.device), None
    if spec.window:
        k_tile, v_tile = _tiles(k, v, slots, state, alignment, spec)
        total, m = window_tiles(q, k_tile, v_tile, hidden_BN1CK, spec)
        total, scale = total.to(dtype), (-m).exp().to(dtype) if spec.shared_shift else None
    if spec.has_linear:
        linear = _linear(q, k, v, far_BN1CK, state, alignment, spec).to(dtype)
        total = total + (linear if scale is None else linear * scale)
    y_BHAV = divide(total).to(q_BHTD.dtype).transpose(1, 2).flatten(2, 3)
    return alignment.scatter(y_BHAV, q_BHTD.shape[2]), next_state(slots, layout, state, spec) if need_state else None


def _with_previous(x_BNGCD: Tensor) -> Tensor:
    """Chunks n - 1 and n side by side, `[B, N, G, 2 C, D]`; zeros before the first."""
    before = torch.cat([torch.zeros_like(x_BNGCD[:, :1]), x_BNGCD[:, :-1]], dim=1)
    return torch.cat([before, x_BNGCD], dim=-2)


def _tiles(
    k: Tensor, v: Tensor, slots: Slots, state: WindowLinearState | None, alignment: Alignment, spec: WindowLinear
) -> tuple[Tensor, Tensor]:
    """Keys and values of each chunk's tile: the document's sinks, the chunk before, the chunk."""
    k_tile, v_tile = _with_previous(k), _with_previous(v)
    if spec.num_sinks == 0:
        return k_tile, v_tile
    old_k = None if state is None else state.sink_k_BGND
    old_v = None if state is None else state.sink_v_BGNV
    sink_k = _sinks(slots.k_BGSD, old_k, slots, alignment, spec)
    sink_v = with_ones(_sinks(slots.v_BGSV, old_v, slots, alignment, spec))
    return torch.cat([sink_k, k_tile], dim=-2), torch.cat([sink_v, v_tile], dim=-2)


def _sinks(x_BGSD: Tensor, old_BGJD: Tensor | None, slots: Slots, alignment: Alignment, spec: WindowLinear) -> Tensor:
    """The first tokens of each chunk's document, `[B, N, G, J, D]`: from the state where it holds them, else from the
    slots."""
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


def _masks(
    alignment: Alignment, slots: Slots, layout: Layout, chunk: int, spec: WindowLinear
) -> tuple[Tensor, Tensor | None]:
    """What each query does not see by softmax, `[B or 1, N, 1, C, K]`, and what it sees by features in its tile
    (None: nothing)."""
    memo = ("masks", chunk, spec.window, spec.shape, spec.num_sinks, spec.branch)
    if slots.num_past == 0 and memo in layout.memo:
        found = layout.memo[memo]
        assert isinstance(found, tuple)
        return found
    c = torch.arange(-chunk, chunk, device=slots.position.device)
    first = alignment.first_BN[..., None]
    query, key = (first + c[chunk:])[..., None], (first + c)[..., None, :]
    live = (alignment.follows_BN[..., None] | (c >= 0))[..., None, :] & (key >= spec.num_sinks)
    if alignment.source_BA is not None and not alignment.whole:
        held = (alignment.source_BA >= 0).unflatten(1, (-1, chunk))[:, :, None]
        live = live & _with_previous(held[..., None])[..., 0]
    seen = live & (key <= query)
    near = in_window(query, key, spec.window, spec.shape)
    one_block = spec.shape == "terraced" and chunk == spec.window
    far = None if one_block or not spec.has_linear else (seen & ~near)[:, :, None]
    shown = seen & near
    if spec.num_sinks:
        sink = torch.arange(spec.num_sinks, device=c.device)
        shown = torch.cat([(sink <= query).expand(*shown.shape[:-1], -1), shown], dim=-1)
    hidden = torch.ones_like(shown) if spec.branch == "linear" else ~shown
    result = (hidden[:, :, None], far)
    if slots.num_past == 0:
        layout.memo[memo] = result
    return result


def _linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far: Tensor | None,
    state: WindowLinearState | None,
    alignment: Alignment,
    spec: WindowLinear,
) -> Tensor:
    """phi_q^T (sum of phi_k [v, 1]^T) over everything beyond the window, `[B, N, H, C, V + 1]`."""
    phi_q, phi_k = spec.features_q(q), spec.features_k(k)
    if spec.num_sinks or not alignment.whole:
        phi_k = phi_k * _foldable(alignment, k.shape[3], spec)[:, :, None, :, None].to(phi_k.dtype)
    value = v.to(phi_k.dtype).repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    added = (phi_k.transpose(-1, -2) @ value).to(state_dtype(q))
    keep = torch.cat([alignment.carried_B1, alignment.follows_BN[:, 1:]], dim=1)
    add = torch.nn.functional.pad(alignment.follows_BN[:, :-1], (1, 0))
    start = None if state is None else state.memory_BHFV
    total = phi_q.to(added.dtype) @ chunk_memories(added, start, keep, add)
    if far is not None:
        a = (phi_q @ _with_previous(phi_k).transpose(-1, -2)).masked_fill(~far, 0)
        total = total + a @ _with_previous(value)
    return total


def _foldable(alignment: Alignment, chunk: int, spec: WindowLinear) -> Tensor:
    """Which aligned slots may enter the sum, `[B or 1, N, C]`: tokens that are no sinks."""
    position = alignment.first_BN[..., None] + torch.arange(chunk, device=alignment.first_BN.device)
    fold = position >= spec.num_sinks
    if alignment.source_BA is not None:
        fold = fold & (alignment.source_BA >= 0).unflatten(1, (-1, chunk))
    return fold
