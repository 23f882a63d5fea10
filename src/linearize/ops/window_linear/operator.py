"""The in-place kernel as an operator of its own, which `torch.compile` keeps whole: it sees what is written, not how.

Letters: B batch, H query heads, G key/value heads, T tokens, U of them (the last) with an output, D head dimension, V
value dimension, C ring slots, N sinks, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.window_linear.spec import FeatureWeights, WindowLinear, weights_of
from linearize.ops.window_linear.state import WindowBuffers

WRITTEN = ("next_B", "begin_B", "k_BGCD", "v_BGCV", "sink_k_BGND", "sink_v_BGNV", "memory_BHFV")


@dataclass(frozen=True, eq=False)
class _Known:
    """A map that a kernel knows, without the module that it came from."""

    weights: FeatureWeights

    def __call__(self, x: Tensor) -> Tensor:
        raise AssertionError("only kernels compute this map")

    def feature_weights(self) -> FeatureWeights:
        return self.weights


@torch.library.custom_op("linearize::window_steps", mutates_args=WRITTEN)
def _window_steps(
    q_BHUD: Tensor,
    k_BGTD: Tensor,
    v_BGTV: Tensor,
    position_BT: Tensor,
    live_BT: Tensor | None,
    following_B: Tensor,
    next_B: Tensor,
    begin_B: Tensor,
    k_BGCD: Tensor,
    v_BGCV: Tensor,
    sink_k_BGND: Tensor,
    sink_v_BGNV: Tensor,
    memory_BHFV: Tensor | None,
    maps: Sequence[Tensor | None],
    factors: Sequence[Tensor | None],
    shape: str,
    branch: str,
    name: str,
    sizes: Sequence[int],
    flags: Sequence[bool],
    scaling: float,
    softcap: float | None,
) -> Tensor:
    from linearize.ops.triton.window import window_linear_steps

    window, num_sinks, tail, commit = sizes
    feature_q, feature_k = ((_Known(_weights(name, part)) if name else None) for part in (maps[:4], maps[4:]))
    spec = WindowLinear(
        window=window,
        shape=shape,  # type: ignore[arg-type]
        branch=branch,  # type: ignore[arg-type]
        scaling=scaling,
        softcap=softcap,
        num_sinks=num_sinks,
        shared_shift=flags[0],
        logits=flags[1],
        feature_q=feature_q,
        feature_k=feature_k,
        log_window_factor_H=factors[0],
        linear_factor_H=factors[1],
    )
    layout = Layout(position_BT=position_BT, tail=tail)
    layout.know(following_B, live_BT)
    state = WindowBuffers(
        next_B=next_B,
        begin_B=begin_B,
        k_BGCD=k_BGCD,
        v_BGCV=v_BGCV,
        sink_k_BGND=sink_k_BGND,
        sink_v_BGNV=sink_v_BGNV,
        memory_BHFV=memory_BHFV,
    )
    y, _ = window_linear_steps(q_BHUD, k_BGTD, v_BGTV, spec=spec, layout=layout, state=state, commit=commit)
    return y


@_window_steps.register_fake
def _shape_of(q_BHUD: Tensor, k_BGTD: Tensor, v_BGTV: Tensor, *others: Any) -> Tensor:
    return q_BHUD.new_empty(*q_BHUD.shape[:3], v_BGTV.shape[3])


def _weights(name: str, tensors: Sequence[Tensor | None]) -> FeatureWeights:
    weight, bias, gain, log_scale = tensors
    return FeatureWeights(name=name, weight_HDC=weight, bias_HC=bias, gain_HD=gain, log_scale_H=log_scale)


def window_steps(
    q_BHUD: Tensor,
    k_BGTD: Tensor,
    v_BGTV: Tensor,
    *,
    spec: WindowLinear,
    layout: Layout,
    state: WindowBuffers,
    commit: int,
) -> Tensor:
    """`in_place` by the kernel, `y: [B, H, U, V]`; one node of a traced graph. The layout is static."""
    assert layout.position_BT is not None and layout.tail is not None
    weights = [None if f is None else weights_of(f) for f in (spec.feature_q, spec.feature_k)]
    maps: list[Tensor | None] = [x for w in weights for x in ((None,) * 4 if w is None else w.tensors)]
    y: Tensor = _window_steps(
        q_BHUD,
        k_BGTD,
        v_BGTV,
        layout.position_BT,
        layout.live_first() if layout.tail else None,
        layout.following(),
        *(getattr(state, name) for name in WRITTEN),
        maps,
        [spec.log_window_factor_H, spec.linear_factor_H],
        spec.shape,
        spec.branch,
        "" if weights[1] is None else weights[1].name,
        [spec.window, spec.num_sinks, layout.tail, commit],
        [spec.shared_shift, spec.logits],
        spec.scaling,
        spec.softcap,
    )
    return y
