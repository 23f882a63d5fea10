"""The exact store: some keys and values from beyond the window that stay as they are (LoLA, 2505.23666), chosen when a
block leaves the window.

Candidates are what is stored and what leaves. Those that the sum recalls worst from their own key stay, by

    e(k, v) = min( sum over a group's query heads of | phi(k)^T H / (phi(k)^T z) - v |^2 ,
                   R times the least | v' - v |^2 of an older candidate v' ) ,

H and z those before the block leaves, compared in bf16, of equals the older; the others are folded into the sum, so no
mass is lost. The second line is ours: without it the same token of every repetition of a phrase is stored again, since
the sum recalls none of them. A query weighs stored keys as it weighs those in the window: exp(s - m), under the one
normaliser. Blocks are those of the terraced window, so every form of the operation takes the same decisions on the same
grid.

Letters: B batch, G key/value heads, R query heads for each, H = G R, T new tokens, U of them (the last) with an output,
N chunks, C tokens of a block, J sinks, P stored pairs, X = P + C candidates, D head dimension, V value dimension, F
features.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.matmul import exp_or_zero
from linearize.ops.window_linear.chunked import sinks_by_group
from linearize.ops.window_linear.masks import group_masks, present_slots
from linearize.ops.window_linear.slots import Alignment, Slots, align, gather_slots
from linearize.ops.window_linear.spec import WindowLinear, divide, fold_boundary, state_dtype, with_ones
from linearize.ops.window_linear.state import RingBuffer, WindowLinearState, take_slots
from linearize.ops.window_linear.update import next_plain_state, next_state

SAME = 2.0**-12
"""Of a value's square: a squared distance below it is that of equal values."""


def num_stored(following_B: Tensor, spec: WindowLinear, begin_B: Tensor | None = None) -> Tensor:
    """How many pairs are stored before the tokens at these positions of documents that begin at `begin_B` (None: at 0):
    whatever left the window while there was room."""
    first = spec.num_sinks if begin_B is None else begin_B.clamp(min=spec.num_sinks)
    return (fold_boundary(following_B, spec.window, spec.shape) - first).clamp(0, spec.store)


def num_stored_at(position: int, spec: WindowLinear) -> int:
    """The same for one position, in documents that begin at 0."""
    return min(max(fold_boundary(position, spec.window, spec.shape) - spec.num_sinks, 0), spec.store)


@dataclass(frozen=True, eq=False)
class Store:
    """Sum and store of all rows: `memory_BHFV` with z as its last column, `k_BGPD`, `v_BGPV` (oldest first), of which
    row b has its first `count_B[b]` (`[B or 1]`)."""

    memory_BHFV: Tensor
    k_BGPD: Tensor
    v_BGPV: Tensor
    count_B: Tensor

    def live(self) -> Tensor:
        """Which pairs there are, `[B or 1, P]`."""
        return torch.arange(self.k_BGPD.shape[2], device=self.count_B.device) < self.count_B[:, None]

    def forgotten(self, keep_B: Tensor) -> Store:
        """Nothing in rows where `keep_B` is False: a document opens."""
        memory = self.memory_BHFV * keep_B[:, None, None, None].to(self.memory_BHFV.dtype)
        return replace(self, memory_BHFV=memory, count_B=self.count_B * keep_B)

    def admit(self, k_BGCD: Tensor, v_BGCV: Tensor, leaves_BC: Tensor, spec: WindowLinear) -> Store:
        """After the pairs of `leaves_BC: [B or 1, C]` have left the window: the best candidates are stored, the others
        folded."""
        dtype, groups = self.memory_BHFV.dtype, k_BGCD.shape[1]
        k, v = torch.cat([self.k_BGPD, k_BGCD], dim=2), torch.cat([self.v_BGPV, v_BGCV], dim=2)
        rows = max(self.count_B.shape[0], leaves_BC.shape[0])
        live_BX = torch.cat([self.live().expand(rows, -1), leaves_BC.expand(rows, -1)], dim=1)
        phi = spec.features_k(k.to(dtype))
        wide = v.to(dtype)
        with torch.no_grad():
            recalled = phi @ self.memory_BHFV
            z = recalled[..., -1:]
            recall = (recalled[..., :-1] / z.masked_fill(z == 0, 1)).unflatten(1, (groups, -1))
            error = (recall - wide[:, :, None]).square().sum((2, 4))
            error = torch.minimum(error, recall.shape[2] * _distance_to_older(wide, live_BX))
            error = error.masked_fill(~live_BX[:, None], -torch.inf)
            best = ranked(error)[..., : spec.store]
            kept_BGX = torch.zeros_like(error, dtype=torch.bool).scatter_(-1, best, True) & live_BX[:, None]
            place = torch.arange(error.shape[-1], device=error.device)
            order = torch.where(kept_BGX, place, place + len(place)).argsort(-1)[..., : spec.store, None]
        folds = (live_BX[:, None] & ~kept_BGX).repeat_interleave(phi.shape[1] // groups, dim=1)
        value = with_ones(wide).repeat_interleave(phi.shape[1] // groups, dim=1)
        memory = self.memory_BHFV + (phi * folds[..., None].to(dtype)).mT @ value
        k, v = (x.gather(2, order.expand(-1, -1, -1, x.shape[3])) for x in (k, v))
        return Store(memory, k, v, live_BX.sum(1).clamp(max=spec.store))


def _distance_to_older(v_BGXV: Tensor, live_BX: Tensor) -> Tensor:
    """The least squared distance of each candidate's value to that of an older one, `[B, G, X]`, from |v|^2 + |v'|^2
    - 2 v v'; 0 where that is no more than rounding leaves of |v|^2."""
    square_BGX = v_BGXV.square().sum(-1)
    older = torch.ones(v_BGXV.shape[2], v_BGXV.shape[2], dtype=torch.bool, device=v_BGXV.device).tril(-1)
    between = (v_BGXV @ v_BGXV.mT).mul_(-2).add_(square_BGX[:, :, None])
    least = between.masked_fill_(~(older & live_BX[:, None, None, :]), torch.inf).amin(-1) + square_BGX
    return least.masked_fill(least < SAME * square_BGX, 0)


def ranked(error_BGX: Tensor) -> Tensor:
    """Candidates, the worst recalled first; of those with the same error in bf16 the older: neither rounding nor a
    processor's sorting decides between tokens that are alike."""
    return error_BGX.to(torch.bfloat16).float().sort(dim=-1, descending=True, stable=True).indices


def store_of(state: WindowLinearState | None, k_BGTD: Tensor, v_BGTV: Tensor, spec: WindowLinear) -> Store:
    """Sum and store of a state, or empty ones."""
    batch, groups = k_BGTD.shape[:2]
    if state is not None and state.memory_BHFV is not None and state.store_k_BGPD is not None:
        assert state.store_v_BGPV is not None
        following = state.next if isinstance(state.next, Tensor) else torch.tensor([state.next], device=k_BGTD.device)
        count = num_stored(following, spec, state.begin)
        k, v = (x.to(k_BGTD.dtype) for x in (state.store_k_BGPD, state.store_v_BGPV))
        return Store(state.memory_BHFV.to(state_dtype(k_BGTD)), k, v, count)
    with torch.no_grad():
        phi = spec.features_k(k_BGTD[:, :, :1].to(state_dtype(k_BGTD)))
    memory = phi.new_zeros(batch, phi.shape[1], phi.shape[3], v_BGTV.shape[3] + 1)
    k, v = (x.new_zeros(batch, groups, spec.store, x.shape[3]) for x in (k_BGTD, v_BGTV))
    return Store(memory, k, v, torch.zeros(1, dtype=torch.long, device=k_BGTD.device))


def with_store(
    q_BHUD: Tensor,
    k_BGTD: Tensor,
    v_BGTV: Tensor,
    *,
    spec: WindowLinear,
    layout: Layout,
    state: WindowLinearState | None = None,
    need_state: bool = True,
) -> tuple[Tensor, WindowLinearState | None]:
    """Attend, block after block; arguments and outputs as those of `reference`, time and memory linear in T."""
    wide, blocks = state_dtype(q_BHUD), _Blocks.of(k_BGTD, v_BGTV, layout, state, spec)
    slots, alignment, chunk = blocks.slots, blocks.alignment, spec.window
    chunks = alignment.num_chunks
    missing = k_BGTD.shape[2] - q_BHUD.shape[2]
    slot_BT = slots.new_origin + slots.new_position  # of the new tokens; not in a row where dead ones were moved
    q = _aligned_queries(torch.nn.functional.pad(q_BHUD, (0, 0, missing, 0)), slot_BT, slots, alignment, layout, chunk)
    sinks = sinks_by_group(slots, alignment, state, spec) if spec.num_sinks and spec.has_window else ()
    bias_BNCK = group_masks(alignment, slice(0, chunks), chunk, spec, wide).bias
    first, ys = store_of(state, k_BGTD, v_BGTV, spec), list[Tensor]()
    for n, store in enumerate(blocks.stores(first, spec)):
        if n == chunks:
            break
        before = max(n - 1, 0)  # what chunk 0 sees of itself in its place is masked
        parts = [(sinks[0][:, :, n], sinks[1][:, :, n])] if sinks else []
        parts += [(blocks.k[:, :, i], blocks.v[:, :, i]) for i in (before, n)]
        bias = None if bias_BNCK is None else bias_BNCK[:, n]
        ys.append(_attend(q[:, :, n].to(wide), parts, store, bias, spec))
    y_BHAV = torch.stack(ys, dim=2).flatten(2, 3)
    back = _of_tokens(y_BHAV, slot_BT, slots, alignment) if layout.gaps() else None
    y = alignment.scatter(y_BHAV, k_BGTD.shape[2]) if back is None else back
    y = y[:, :, missing:].to(q_BHUD.dtype)
    return y, blocks.after(store, layout, state, spec) if need_state else None


def advance_with_store(
    k_BGTD: Tensor, v_BGTV: Tensor, *, spec: WindowLinear, layout: Layout, state: WindowLinearState | None
) -> WindowLinearState:
    """The state after these tokens, without outputs."""
    blocks = _Blocks.of(k_BGTD, v_BGTV, layout, state, spec)
    stores = blocks.stores(store_of(state, k_BGTD, v_BGTV, spec), spec)
    return blocks.after(deque(stores, maxlen=1)[0], layout, state, spec)


@dataclass(frozen=True, eq=False)
class _Blocks:
    """Ring and new tokens as aligned blocks of the window: keys and values, `[B, G, N, C, .]`, and which slots hold a
    token, `[B or 1, N, C]`."""

    slots: Slots
    alignment: Alignment
    k: Tensor
    v: Tensor
    present_BNC: Tensor

    @staticmethod
    def of(
        k_BGTD: Tensor, v_BGTV: Tensor, layout: Layout, state: WindowLinearState | None, spec: WindowLinear
    ) -> _Blocks:
        """The blocks of a call."""
        slots, chunk = gather_slots(k_BGTD, v_BGTV, layout, state, spec), spec.window
        alignment = align(slots, layout, chunk, spec)
        present = present_slots(alignment, chunk)
        if present is None:
            place = torch.arange(alignment.num_chunks * chunk, device=k_BGTD.device)
            present = (place < slots.k_BGSD.shape[2]).view(1, -1, chunk)
        k, v = (alignment.gather(x, chunk) for x in (slots.k_BGSD, slots.v_BGSV))
        return _Blocks(slots, alignment, k, v, present)

    def stores(self, store: Store, spec: WindowLinear) -> Iterator[Store]:
        """What the queries of each chunk see, given what there was before; at last what is there after all of them."""
        alignment, chunks = self.alignment, self.alignment.num_chunks
        has_tokens = self.present_BNC.any(2).any(1)[:, None]
        keep_BN = torch.cat([alignment.carried_B1, alignment.follows_BN[:, 1:]], dim=1) | ~has_tokens
        for n in range(chunks + 1):
            if n < chunks and not bool(keep_BN[:, n].all()):
                store = store.forgotten(keep_BN[:, n])
            if n >= 2:
                leaves = _leaves(alignment, self.present_BNC, n, spec)
                if bool(leaves.any()):
                    store = store.admit(self.k[:, :, n - 2], self.v[:, :, n - 2], leaves, spec)
            yield store

    def after(
        self, store: Store, layout: Layout, state: WindowLinearState | None, spec: WindowLinear
    ) -> WindowLinearState:
        """The state after all tokens, with the last of `stores`."""
        return _with(next_state(self.slots, layout, state, replace(spec, feature_q=None, feature_k=None)), store)


def plain_after(
    k_BGSD: Tensor,
    v_BGSV: Tensor,
    num_past: int,
    start: int,
    state: WindowLinearState,
    spec: WindowLinear,
    ring_buffer: RingBuffer | None,
) -> WindowLinearState:
    """`next_plain_state` after one token, with the store."""
    following = start + k_BGSD.shape[2] - num_past
    first = following - k_BGSD.shape[2]
    gone = fold_boundary(following, spec.window, spec.shape) - first
    without = replace(spec, feature_q=None, feature_k=None)
    after = next_plain_state(k_BGSD, v_BGSV, num_past, start, state, without, ring_buffer=ring_buffer)
    if gone <= 0:
        return replace(after, store_k_BGPD=state.store_k_BGPD, store_v_BGPV=state.store_v_BGPV)
    leaves = torch.arange(first, first + gone, device=k_BGSD.device)[None] >= spec.num_sinks
    store = store_of(state, k_BGSD, v_BGSV, spec).admit(k_BGSD[:, :, :gone], v_BGSV[:, :, :gone], leaves, spec)
    return _with(after, store)


def _with(state: WindowLinearState, store: Store) -> WindowLinearState:
    return replace(state, memory_BHFV=store.memory_BHFV, store_k_BGPD=store.k_BGPD, store_v_BGPV=store.v_BGPV)


def _aligned_queries(
    q_BHTD: Tensor, slot_BT: Tensor, slots: Slots, alignment: Alignment, layout: Layout, chunk: int
) -> Tensor:
    """Queries in aligned chunks, `[B, H, N, C, D]`; 0 in slots of no new token."""
    if not layout.gaps():
        return alignment.gather_queries(q_BHTD, chunk)
    batch, heads, _, dim = q_BHTD.shape
    beside = q_BHTD.new_zeros(batch, heads, slots.k_BGSD.shape[2], dim)
    return alignment.gather(beside.scatter(2, slot_BT[:, None, :, None].expand_as(q_BHTD), q_BHTD), chunk)


def _of_tokens(y_BHAV: Tensor, slot_BT: Tensor, slots: Slots, alignment: Alignment) -> Tensor:
    """Aligned outputs back to the new tokens where dead ones were moved, `[B, H, T, V]`; 0 on dead ones."""
    source = alignment.source_BA
    assert source is not None
    place = torch.arange(source.shape[1], device=source.device).expand_as(source)
    aligned_BS = torch.zeros(source.shape[0], slots.k_BGSD.shape[2] + 1, dtype=torch.long, device=source.device)
    aligned_BS.scatter_(1, torch.where(source >= 0, source, slots.k_BGSD.shape[2]), place)
    return take_slots(y_BHAV, aligned_BS.gather(1, slot_BT)) * (slots.new_position >= 0)[:, None, :, None]


def _by_group(q_BHCD: Tensor, groups: int) -> Tensor:
    """The query heads of a key/value head as rows of one matrix, `[B, G, R C, D]`: products copy no keys."""
    batch, heads, tokens, dim = q_BHCD.shape
    return q_BHCD.reshape(batch, groups, heads // groups * tokens, dim)


def _leaves(alignment: Alignment, present_BNC: Tensor, n: int, spec: WindowLinear) -> Tensor:
    """Which tokens of chunk n - 2 leave the window when chunk n begins, `[B or 1, C]`: it begins once chunk n - 1 is
    full, whether or not its first token is there."""
    begun = present_BNC[:, n - 1, -1]
    same = alignment.follows_BN[:, n - 1]
    if n < alignment.num_chunks:
        begun = begun | present_BNC[:, n].any(-1)
        same = same & alignment.follows_BN[:, n]
    position = alignment.first_BN[:, n - 2, None] + torch.arange(spec.window, device=present_BNC.device)
    return present_BNC[:, n - 2] & (position >= spec.num_sinks) & (begun & same)[:, None]


def _attend(
    q_BHCD: Tensor, parts: list[tuple[Tensor, Tensor]], store: Store, bias: Tensor | None, spec: WindowLinear
) -> Tensor:
    """A chunk's outputs, `[B, H, C, V]`. `bias`: of the parts side by side, `[B or 1, C, J + 2 C]`."""
    wide, groups = q_BHCD.dtype, store.k_BGPD.shape[1]
    total, m = None, None
    if bias is not None:
        if spec.branch == "both":
            parts = [*parts, (store.k_BGPD, store.v_BGPV)]
            more = torch.zeros_like(store.live(), dtype=wide).masked_fill_(~store.live(), -torch.inf)[:, None]
            rows = max(more.shape[0], bias.shape[0])
            bias = torch.cat([bias.expand(rows, -1, -1), more.expand(rows, bias.shape[1], -1)], dim=-1)
        k, v = (torch.cat([pair[i] for pair in parts], dim=2).to(wide) for i in range(2))
        per_group = q_BHCD.unflatten(1, (groups, -1)).shape[:4]
        s = (_by_group(q_BHCD * spec.scaling, groups) @ k.mT).view(*per_group, k.shape[2])
        s = s if spec.softcap is None else spec.softcap * torch.tanh(s / spec.softcap)
        s = s + bias[:, None, None]
        m = spec.shift(s.amax(-1, keepdim=True))
        if spec.log_window_factor_H is not None:
            s = s + spec.log_window_factor_H.to(wide).view(groups, -1, 1, 1)
        p = exp_or_zero(s - m)
        total = (p.flatten(2, 3) @ with_ones(v)).view(*q_BHCD.shape[:3], v.shape[3] + 1)
        m = m.flatten(1, 2)
    if spec.has_linear:
        recalled = spec.features_q(q_BHCD) @ store.memory_BHFV.to(wide)
        recalled = recalled * (-m).exp() if m is not None and spec.shared_shift else recalled
        total = recalled if total is None else total + recalled
    assert total is not None
    return divide(total)
