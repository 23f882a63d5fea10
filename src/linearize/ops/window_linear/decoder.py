"""Token after token of one row on a CPU: what `step` computes, in few calls over memory that is written in place.

At SmolLM2's shape a call of PyTorch costs a few microseconds whatever it computes, since the weights of a layer push its
code and data out of the caches: calls are what a decoded token of a linear layer consists of. A `WindowDecoder` takes
over a state and what the feature map needs in one product, keeps ring and sinks side by side (keys and values of a token
in one slot), and gives the state back as a value when it is asked for; it is not to be used any more then.

The two branches are weighed by their normalisers, Z of the window and r of the linear branch: y = w y_window +
(1 - w) y_linear with w = sigmoid(log g + log Z - log r). The gain and the linear factor of a token's query scale the
linear branch's values and r alike, so they enter log r alone.

Letters: G key/value heads, R query heads for each, H = G R, D head and value dimension, C slots (sinks, then two blocks
of the window), N sinks, F columns of a map, 1 the row or the token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops.hedgehog import SMALLEST
from linearize.ops.layout import Layout
from linearize.ops.window_linear.backends import DISPATCH
from linearize.ops.window_linear.spec import GAIN_LIMIT, FeatureWeights, WindowLinear, fold_boundary, weights_of
from linearize.ops.window_linear.state import WindowLinearState
from linearize.ops.window_linear.update import folded

MAPS = ("gain", "hedgehog")


def can_decode(q_BHUD: Tensor, k_BGTD: Tensor, state: object, spec: WindowLinear, layout: Layout) -> bool:
    """Whether a `WindowDecoder` serves for this token and those after it: one row on a CPU that goes on from `state`,
    in fp32 or fp64 without gradients; a terraced window, and a map that is known here."""
    if not isinstance(state, WindowLinearState) or k_BGTD.shape[0] != 1 or k_BGTD.shape[2] != 1:
        return False
    ring = state.k_BGRD
    return (
        k_BGTD.device.type == "cpu"
        and q_BHUD.dtype == k_BGTD.dtype == ring.dtype
        and q_BHUD.dtype in (torch.float32, torch.float64)
        and ring.shape[3] == state.v_BGRV.shape[3] == q_BHUD.shape[3]
        and layout.is_plain
        and isinstance(state.next, int)
        and state.next == layout.start
        and state.begin is None
        and ring.shape[2] == state.next - fold_boundary(state.next, spec.window, spec.shape)
        and (not spec.num_sinks or (state.sink_k_BGND is not None and state.sink_k_BGND.shape[2] == spec.num_sinks))
        and spec.shape == "terraced"
        and spec.window > 0
        and spec.softcap is None
        and spec.branch == "both"
        and not spec.store
        and (spec.feature_q is None or _known(spec.feature_q) is not None)
        and _is_free()
    )


def _is_free() -> bool:
    """Whether nothing asks for another backend, for gradients, for other dtypes or for a graph."""
    return (
        DISPATCH.forced is None
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _known(feature_map: object) -> FeatureWeights | None:
    weights = weights_of(feature_map)
    return weights if weights is not None and weights.name in MAPS else None


class WindowDecoder:
    """A state that tokens are read into one by one; `state()` gives it back and ends the decoder."""

    def __init__(self, state: WindowLinearState, spec: WindowLinear, num_heads: int) -> None:
        """To be asked for where `can_decode`; takes copies of all that is written to."""
        assert isinstance(state.next, int)
        spec = spec.resolved()
        self.spec, self._given, self.next = spec, state, state.next
        (_, groups, ring, dim), sinks = state.k_BGRD.shape, spec.num_sinks
        self.groups, self.copies, self.shared = groups, num_heads // groups, spec.shared_shift
        with torch.inference_mode(False):
            slots_CGD = state.k_BGRD.new_empty(sinks + 2 * spec.window, 2 * groups, dim)
        self._slots = [slot[None, :, None] for slot in slots_CGD.unbind(0)]
        self.k_1GCD, self.v_1GCD = (slots_CGD[:, of].transpose(0, 1)[None] for of in (slice(groups), slice(groups, None)))
        self.filled, self.last = sinks + ring, sinks + 2 * spec.window
        self.k_1GCD[:, :, sinks : self.filled] = state.k_BGRD
        self.v_1GCD[:, :, sinks : self.filled] = state.v_BGRV
        oldest = state.next - ring
        self.first = 0 if oldest > 0 else sinks  # sinks are in the ring until the first block leaves it
        if oldest > 0 and state.sink_k_BGND is not None and state.sink_v_BGNV is not None:
            self.k_1GCD[:, :, :sinks], self.v_1GCD[:, :, :sinks] = state.sink_k_BGND, state.sink_v_BGNV
        self.memory = state.memory_BHFV
        self.recalls = self.memory is not None and oldest > sinks
        if self.memory is not None:
            self._prepare(slots_CGD)

    def _prepare(self, like: Tensor) -> None:
        """The map of a query as one product, and memory for what a token leaves nothing of."""
        heads, grouped = self.groups * self.copies, (1, self.groups, self.copies)
        known, g = _known(self.spec.feature_q), self.spec.log_window_factor_H
        assert known is not None and known.weight_HDC is not None and self.memory is not None
        with torch.inference_mode(False), torch.no_grad():
            w_HDF = known.weight_HDC.detach().to(like.dtype)
            shift_H = like.new_zeros(heads) if g is None else g.detach().to(like.dtype).clone()
            if (factor := self.spec.linear_factor_H) is not None:
                shift_H -= factor.detach().to(like.dtype).log()
            parts = [w_HDF, -w_HDF]
            if known.gain_HD is not None and known.log_scale_H is not None:
                parts.append(known.gain_HD.detach().to(like.dtype)[..., None])
            self.weight_HDX = torch.cat(parts, dim=-1)
            features = 2 * w_HDF.shape[2]
            z_H1X = like.new_empty(heads, 1, self.weight_HDX.shape[2])
            self.bias_H1X, self.shift_1GR = torch.zeros_like(z_H1X), shift_H.view(grouped)
            self.has_gain = len(parts) == 3
            if self.has_gain:
                self.bias_H1X[:, 0, -1] = known.log_scale_H.detach().to(like.dtype) - shift_H
                self.lowest_1GR, self.highest_1GR = -GAIN_LIMIT - self.shift_1GR, GAIN_LIMIT - self.shift_1GR
            self.z_H1X, self.gain_1GR = z_H1X, z_H1X[:, 0, -1].view(grouped)
            self.z_H2F = z_H1X[:, 0, :features].unflatten(-1, (2, -1))
            self.phi_H2F = torch.empty_like(self.z_H2F, memory_format=torch.contiguous_format)
            self.phi_H1F = self.phi_H2F.view(heads, 1, features)
            self.total_H1V = like.new_empty(heads, 1, self.memory.shape[3])
            total_1GRV = self.total_H1V.view(*grouped, -1)
            self.values_1GRV, self.ones_1GR1 = total_1GRV[..., :-1], total_1GRV[..., -1:]
            self.ones_1GR = total_1GRV[..., -1]
            self.memory_HFV = self.memory[0].to(like.dtype)

    def continues(self, q_BHUD: Tensor, layout: Layout) -> bool:
        """Whether these are the queries of the one token that comes next."""
        return (
            layout.position_BT is None
            and layout.start == self.next
            and q_BHUD.shape[2] == 1
            and q_BHUD.shape[0] == 1
            and q_BHUD.dtype == self.k_1GCD.dtype
            and _is_free()
        )

    def step(self, q_1H1D: Tensor, k_1G1D: Tensor, v_1G1D: Tensor) -> Tensor:
        """Read one token; gives its output, `[1, H, 1, D]`."""
        slot = self.filled
        torch.cat((k_1G1D, v_1G1D), 1, out=self._slots[slot])
        first, self.filled, self.next = self.first, slot + 1, self.next + 1
        k, v = self.k_1GCD.narrow(2, first, slot + 1 - first), self.v_1GCD.narrow(2, first, slot + 1 - first)
        q_1GRD = q_1H1D.reshape(1, self.groups, self.copies, -1)
        y_1GRD, log_z_1GR = self._window(q_1GRD, k, v)
        if self.recalls:
            y_1GRD = self._join(q_1GRD, y_1GRD, log_z_1GR)
        if slot + 1 == self.last:
            self._fold()
        return y_1GRD.reshape(1, -1, 1, y_1GRD.shape[3])

    def _window(self, q_1GRD: Tensor, k_1GSD: Tensor, v_1GSD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of the values seen, and the logarithm of its normaliser, with the shift where that is shared."""
        if self.shared or not self.recalls:
            found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_1GRD, k_1GSD, v_1GSD, scale=self.spec.scaling
            )
            return found
        s_GRS = torch.bmm(q_1GRD[0], k_1GSD[0].mT).mul_(self.spec.scaling)
        p_GRS = s_GRS.softmax(-1)
        return torch.bmm(p_GRS, v_1GSD[0])[None], p_GRS.amax(-1)[None].log_().neg_()  # the largest weight is 1 / Z

    def _join(self, q_1GRD: Tensor, y_1GRD: Tensor, log_z_1GR: Tensor) -> Tensor:
        q_H1D = q_1GRD.view(-1, 1, q_1GRD.shape[3])
        torch.baddbmm(self.bias_H1X, q_H1D, self.weight_HDX, out=self.z_H1X)
        torch.softmax(self.z_H2F, -1, out=self.phi_H2F)
        self.phi_H2F.clamp_(min=SMALLEST)
        torch.bmm(self.phi_H1F, self.memory_HFV, out=self.total_H1V)
        log_r_1GR = self.ones_1GR.log()
        if self.has_gain:
            log_r_1GR += self.gain_1GR.clamp(self.lowest_1GR, self.highest_1GR)
        else:
            log_r_1GR -= self.shift_1GR
        of_window_1GR = (log_z_1GR - log_r_1GR).sigmoid_()
        return (self.values_1GRV / self.ones_1GR1).lerp_(y_1GRD, of_window_1GR[..., None])

    def _fold(self) -> None:
        """The older block goes into the sum, the newer one takes its place."""
        sinks, window = self.spec.num_sinks, self.spec.window
        oldest = self.next - 2 * window
        k, v = (x[:, :, sinks : sinks + window] for x in (self.k_1GCD, self.v_1GCD))
        left = sinks if oldest == 0 else 0
        if self.memory is not None and left < window:
            self.memory = folded(k[:, :, left:], v[:, :, left:], None, self.memory, self.spec)
            self.memory_HFV = self.memory[0].to(k.dtype)
        self.recalls = self.memory is not None and oldest + window > sinks
        for x in (self.k_1GCD, self.v_1GCD):
            if oldest == 0:
                x[:, :, :sinks] = x[:, :, sinks : 2 * sinks]
            x[:, :, sinks : sinks + window] = x[:, :, sinks + window :]
        self.first, self.filled = 0, sinks + window

    def state(self) -> WindowLinearState:
        """The state after all tokens read, a value; the decoder must not read another token."""
        sinks, given = self.spec.num_sinks, self._given
        k, v = (x[:, :, sinks : self.filled] for x in (self.k_1GCD, self.v_1GCD))
        return WindowLinearState(self.next, k, v, self.memory, given.sink_k_BGND, given.sink_v_BGNV)
