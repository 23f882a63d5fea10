"""Token after token of one row on a CPU: what `step` computes, in few calls over memory that is written in place.

A call of PyTorch costs a few microseconds whatever it computes, as the weights of a layer push its code and data out of
the caches: at SmolLM2's shape calls are most of a decoded token's attention. A `WindowDecoder` takes over a state and
what the feature map needs in one product, keeps sinks, exact store and ring side by side, and gives the state back as a
value when it is asked for; it is not to be used any more then. Its memory and arithmetic are in at least fp32, as those
of every backend: keys and values of 16 bits are the same numbers there.

The linear branch is one more key of the softmax: its score is log r - log g (r its normaliser, g the window's factor;
the published shift adds the largest score), its value is its numerator over r. What scales a token's query, the gain
and the linear factor, scales numerator and r alike, so it enters that score alone.

Letters: G key/value heads, R query heads for each, H = G R, D head and value dimension, C slots (sinks, stored pairs,
then two blocks of the window), S of them that are seen, F columns of a map, X columns of a product, 1 the row or the
token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from linearize.ops.hedgehog import SMALLEST
from linearize.ops.layout import Layout
from linearize.ops.window_linear.backends import DISPATCH
from linearize.ops.window_linear.spec import (
    GAIN_LIMIT,
    FeatureWeights,
    WindowLinear,
    fold_boundary,
    state_dtype,
    weights_of,
)
from linearize.ops.window_linear.state import WindowLinearState
from linearize.ops.window_linear.store import Store, num_stored_at, store_of
from linearize.ops.window_linear.update import folded

MAPS = ("gain", "hedgehog")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def can_decode(q_BHUD: Tensor, k_BGTD: Tensor, state: object, spec: WindowLinear, layout: Layout) -> bool:
    """Whether a `WindowDecoder` serves for this token and those after it: one row on a CPU that goes on from `state`,
    without gradients; a terraced window, and a map that is known here."""
    if not isinstance(state, WindowLinearState) or k_BGTD.shape[::2] != (1, 1):
        return False
    ring = state.k_BGRD
    return (
        has_decoder(spec, k_BGTD.device.type, k_BGTD.dtype)
        and q_BHUD.dtype == k_BGTD.dtype == ring.dtype
        and ring.shape[3] == state.v_BGRV.shape[3] == q_BHUD.shape[3]
        and layout.is_plain
        and isinstance(state.next, int)
        and state.next == layout.start
        and state.begin is None
        and ring.shape[2] == state.next - fold_boundary(state.next, spec.window, spec.shape)
        and (not spec.num_sinks or (state.sink_k_BGND is not None and state.sink_k_BGND.shape[2] == spec.num_sinks))
        and _is_free()
    )


def has_decoder(spec: WindowLinear, device: str, dtype: torch.dtype) -> bool:
    """Whether one row of an operation can go through a `WindowDecoder` on a device of this type."""
    return (
        device == "cpu"
        and dtype in DTYPES
        and spec.shape == "terraced"
        and spec.window > 0
        and spec.softcap is None
        and spec.branch == "both"
        and (_known(spec.feature_q) is not None if spec.has_linear else not spec.store)
        and DISPATCH.forced is None
    )


def _is_free() -> bool:
    """Whether nothing asks for gradients, for other dtypes, for a graph or for a backend."""
    return (
        not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and DISPATCH.forced is None
    )


def _known(feature_map: object) -> FeatureWeights | None:
    weights = weights_of(feature_map)
    return weights if weights is not None and weights.name in MAPS else None


class _Views(NamedTuple):
    """What a token sees, and where its scores go, in one piece; `linear_GR1`: that of the linear branch."""

    k_GDS: Tensor
    v_GSD: Tensor
    s_GRS: Tensor
    linear_GR1: Tensor


class WindowDecoder:
    """A state that tokens are read into one by one; `state()` gives it back and ends the decoder. The map of queries is
    a copy of the weights at that time."""

    def __init__(self, state: WindowLinearState, spec: WindowLinear, num_heads: int) -> None:
        """To be asked for where `can_decode`; takes copies of all that is written to."""
        assert isinstance(state.next, int)
        spec = spec.resolved()
        self.spec, self.next = spec, state.next
        (_, groups, ring, dim), before = state.k_BGRD.shape, 1 + spec.num_sinks + spec.store
        self.groups, self.copies, self.shared = groups, num_heads // groups, spec.shared_shift
        slots = before + 2 * spec.window  # the first one in use is the linear branch's: a key and a value of 0
        self.dtype = state.k_BGRD.dtype
        with torch.inference_mode(False):
            slots_CGD = state.k_BGRD.new_zeros(slots, 2 * groups, dim, dtype=state_dtype(state.k_BGRD))
            self._scores = slots_CGD.new_empty(num_heads * slots)
        self._slots = [slot[None, :, None] for slot in slots_CGD.unbind(0)]
        self._views: dict[tuple[int, int], _Views] = {}
        self.first = before  # what tokens see begins here
        self.k_GCD, self.v_GCD = slots_CGD.transpose(0, 1).split(groups)
        self.ring, self.filled, self.last = before, before + ring, slots  # first slot, next one, end
        self._put(self.ring, state.k_BGRD, state.v_BGRV)
        self._sinks, self.memory, stored = (state.sink_k_BGND, state.sink_v_BGNV), state.memory_BHFV, None
        if spec.store:
            stored = store_of(state, state.k_BGRD[:, :, :1], state.v_BGRV[:, :, :1], spec)
            self.memory = stored.memory_BHFV
        self._begin(state.next - ring, stored)
        if self.memory is not None:
            self._prepare(slots_CGD)

    def _put(self, slot: int, k_1GND: Tensor, v_1GND: Tensor) -> None:
        for memory, x in ((self.k_GCD, k_1GND), (self.v_GCD, v_1GND)):
            memory[:, slot : slot + x.shape[2]] = x[0]

    def _begin(self, oldest: int, stored: Store | None) -> None:
        """What tokens see while the ring's first one is at position `oldest`: sinks are in the ring at first. They and
        the stored pairs end where the ring begins."""
        sinks, before = self.spec.num_sinks, self.first
        self.stored = num_stored_at(self.next, self.spec) if stored is not None else 0
        self.recalls = self.memory is not None and oldest > sinks + self.stored
        place = self.ring - self.stored - sinks
        self.first = place - 1 if self.recalls else place if oldest > 0 else self.ring
        if stored is not None:
            self._put(self.ring - self.stored, stored.k_BGPD[:, :, : self.stored], stored.v_BGPV[:, :, : self.stored])
            self.k_GCD[:, place - 1] = self.v_GCD[:, place - 1] = 0
        if oldest > 0 and self._sinks[0] is not None and self._sinks[1] is not None:
            self._put(place, self._sinks[0], self._sinks[1])
        if before != self.first:
            self._views.clear()

    def _held(self, dtype: torch.dtype) -> Store:
        """The store as a value, its pairs in this dtype; what a state shows of it is in the slots."""
        assert self.memory is not None
        first, empty = self.ring - self.stored, self.spec.store - self.stored
        k, v = (
            torch.nn.functional.pad(x[None, :, first : self.ring], (0, 0, 0, empty)).to(dtype)
            for x in (self.k_GCD, self.v_GCD)
        )
        return Store(self.memory, k, v, torch.tensor([self.stored], device=k.device))

    def _prepare(self, like: Tensor) -> None:
        """The map of a query as one product, and memory for what a token leaves nothing of."""
        grouped = (self.groups, self.copies, 1)
        heads, known, g = self.groups * self.copies, _known(self.spec.feature_q), self.spec.log_window_factor_H
        assert known is not None and known.weight_HDC is not None and self.memory is not None
        with torch.inference_mode(False), torch.no_grad():
            w_HDF = known.weight_HDC.detach().to(like.dtype)
            scale_H = like.new_zeros(heads) if g is None else -g.detach().to(like.dtype)
            if (factor := self.spec.linear_factor_H) is not None:
                scale_H += factor.detach().to(like.dtype).log()
            parts, features = [w_HDF], w_HDF.shape[2]
            if known.gain_HD is not None:
                parts.append(known.gain_HD.detach().to(like.dtype)[..., None])
            self.weight_HDX = torch.cat(parts, dim=-1)
            self.z_H1X = like.new_empty(heads, 1, self.weight_HDX.shape[2])
            self.bias_H1X, self.scale_GR1 = torch.zeros_like(self.z_H1X), scale_H.view(grouped)
            self.has_gain = known.log_scale_H is not None
            if known.log_scale_H is not None:
                self.bias_H1X[:, 0, -1] = known.log_scale_H.detach().to(like.dtype) + scale_H
                self.lowest_GR1, self.highest_GR1 = self.scale_GR1 - GAIN_LIMIT, self.scale_GR1 + GAIN_LIMIT
            self.gain_GR1 = self.z_H1X[:, 0, -1].view(grouped)
            self.z_H1F, self.signs_21 = self.z_H1X[..., :features], like.new_tensor([[1.0], [-1.0]])
            self.phi_H2F = like.new_empty(heads, 2, features)
            self.phi_H1F = self.phi_H2F.view(heads, 1, 2 * features)
            self.total_H1V = like.new_empty(heads, 1, self.memory.shape[3])
            self.values_GRD, self.ones_GR1 = self.total_H1V.view(*grouped[:2], -1).split((self.v_GCD.shape[2], 1), 2)
            self.memory_HFV = self.memory[0].to(like.dtype)

    def continues(self, q_BHUD: Tensor, layout: Layout) -> bool:
        """Whether these are the queries of the one token that comes next."""
        return (
            layout.start == self.next
            and layout.position_BT is None
            and q_BHUD.shape[:3:2] == (1, 1)
            and q_BHUD.dtype is self.dtype
            and _is_free()
        )

    def step(self, q_1H1D: Tensor, k_1G1D: Tensor, v_1G1D: Tensor) -> Tensor:
        """Read one token; gives its output, `[1, H, 1, D]`."""
        slot = self.filled
        torch.cat((k_1G1D, v_1G1D), 1, out=self._slots[slot])
        self.filled, self.next = slot + 1, self.next + 1
        views = self._views.get((self.first, slot)) or self._view(slot)
        q_GRD, s_GRS = q_1H1D.reshape(self.groups, self.copies, -1).to(self.k_GCD.dtype), views.s_GRS
        torch.baddbmm(s_GRS, q_GRD, views.k_GDS, beta=0, alpha=self.spec.scaling, out=s_GRS)
        linear_GRD = self._recall(q_GRD, views) if self.recalls else None
        torch.softmax(s_GRS, -1, out=s_GRS)
        if linear_GRD is None:
            y_GRD = torch.bmm(s_GRS, views.v_GSD)
        else:
            y_GRD = (linear_GRD * (views.linear_GR1 / self.ones_GR1)).baddbmm_(s_GRS, views.v_GSD)
        if slot + 1 == self.last:
            self._fold()
        return y_GRD.view(1, -1, 1, y_GRD.shape[2]).to(self.dtype)

    def _view(self, slot: int) -> _Views:
        """What a token in this slot sees; kept for the token that will be there after the next fold."""
        first, seen = self.first, slot + 1 - self.first
        k_GSD, v_GSD = self.k_GCD.narrow(1, first, seen), self.v_GCD.narrow(1, first, seen)
        heads = self.groups * self.copies
        s_GRS = self._scores[: heads * seen].view(self.groups, self.copies, seen)
        views = self._views[first, slot] = _Views(k_GSD.mT, v_GSD, s_GRS, s_GRS[..., :1])
        return views

    def _recall(self, q_GRD: Tensor, views: _Views) -> Tensor:
        """The linear branch's numerator; its normaliser is in `ones_GR1` then, its score among those of the window."""
        torch.baddbmm(self.bias_H1X, q_GRD.view(-1, 1, q_GRD.shape[2]), self.weight_HDX, out=self.z_H1X)
        torch.mul(self.z_H1F, self.signs_21, out=self.phi_H2F)
        torch.softmax(self.phi_H2F, -1, out=self.phi_H2F)
        self.phi_H2F.clamp_(min=SMALLEST)
        torch.bmm(self.phi_H1F, self.memory_HFV, out=self.total_H1V)
        score_GR1 = self.ones_GR1.log()
        if not self.shared:
            score_GR1 += views.s_GRS[..., 1:].amax(-1, keepdim=True)
        scale_GR1 = self.gain_GR1.clamp(self.lowest_GR1, self.highest_GR1) if self.has_gain else self.scale_GR1
        torch.add(score_GR1, scale_GR1, out=views.linear_GR1)
        return self.values_GRD

    def _fold(self) -> None:
        """The older block goes into the sum, the newer one takes its place."""
        sinks, window, ring = self.spec.num_sinks, self.spec.window, self.ring
        oldest, stored = self.next - 2 * window, None
        left = sinks if oldest == 0 else 0
        k, v = (x[None, :, ring : ring + window] for x in (self.k_GCD, self.v_GCD))
        if self.spec.store:
            leaves_1C = (torch.arange(window) >= left)[None]
            stored = self._held(k.dtype).admit(k, v, leaves_1C, self.spec)
            self.memory = stored.memory_BHFV
        elif self.memory is not None and left < window:
            self.memory = folded(k[:, :, left:], v[:, :, left:], None, self.memory, self.spec)
        if self.memory is not None:
            self.memory_HFV = self.memory[0].to(k.dtype)
        for x in (self.k_GCD, self.v_GCD):
            x[:, ring : ring + window] = x[:, ring + window :]
        self.filled = ring + window
        self._begin(oldest + window, stored)

    def state(self) -> WindowLinearState:
        """The state after all tokens read, a value; the decoder must not read another token."""
        k, v = (x[None, :, self.ring : self.filled].to(self.dtype) for x in (self.k_GCD, self.v_GCD))
        held = self._held(self.dtype) if self.spec.store else None
        return WindowLinearState(
            self.next, k, v, self.memory, *self._sinks,
            store_k_BGPD=None if held is None else held.k_BGPD, store_v_BGPV=None if held is None else held.v_BGPV,
        )  # fmt: skip
