"""Liger's gated linear attention: the gate is the key projection itself, so nothing is new (2503.01496, section 3.2).

    y_n = w softmax attention over the last tokens + (1 - w) softmax(q_n)^T S_n
    S_n = diag(exp(g_n)) S_{n-1} + softmax(k_n) v_n^T,    g_n = log sigmoid(K_n) / 16

K is the key projection's output before norms and rotary positions: the paper pools it to one gate per key dimension of
every key/value head, which is its own size. Departure from the published code: q and k of the linear term come with
rotary positions, as they stand between the projections and the mixer.

Letters: B batch, T tokens, H query heads, G key/value heads, D head dimension, V value dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor

from linearize.mixers.base import AttentionMixer, AttentionShape, Mixer, MixerConfig, MixerCost
from linearize.ops.dispatch import Call, Dispatcher, Query
from linearize.ops.layout import Layout
from linearize.ops.recurrent.decay_linear import DISPATCH as DECAY_LINEAR
from linearize.ops.recurrent.decay_linear import gated_linear
from linearize.ops.window_linear import Branch, WindowLinear, WindowLinearState, WindowShape, advance, window_linear
from linearize.ops.window_linear.backends import DISPATCH as WINDOW_LINEAR
from linearize.ops.window_linear.backends import WindowCall
from linearize.ops.window_linear.spec import ring_slots
from linearize.ops.window_linear.state import WindowBuffers


class GlaConfig(MixerConfig):
    """The defaults are the published settings.

    `window`: tokens seen by softmax. `window_shape`: `sliding` or `terraced`. `window_share`: w, the weight of the
    window; the linear term has the rest. `gate_divisor`: what the log gate is divided by (more: a longer memory).
    """

    name: Literal["gla"] = "gla"
    window: int = Field(64, ge=1)
    window_shape: WindowShape = "sliding"
    window_share: float = Field(0.5, ge=0, le=1)
    gate_divisor: float = Field(16.0, gt=0)

    @property
    def reads_projections(self) -> bool:
        """See `MixerConfig`: the gate is the key projection's output."""
        return True

    @property
    def has_two_branches(self) -> bool:
        """See `MixerConfig`."""
        return self.window > 0

    def build(self, shape: AttentionShape) -> Mixer:
        """The mixer; it has no parameters."""
        return Gla(self, shape)


@dataclass(frozen=True, eq=False)
class GlaState:
    """`window`: keys and values inside the window. `memory_BGDV`: the gated sum per key/value head, at least fp32."""

    window: WindowLinearState | WindowBuffers
    memory_BGDV: Tensor

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> GlaState:
        """The same state with `change` applied to every tensor; all have the batch first."""
        return GlaState(self.window.map_batch(change), change(self.memory_BGDV))

    def widened(self, more: int) -> GlaState:
        """See `TensorState.widened`."""
        return GlaState(self.window.widened(more), self.memory_BGDV)

    @property
    def num_bytes(self) -> int:
        """Bytes held by the state's tensors."""
        return self.window.num_bytes + self.memory_BGDV.numel() * self.memory_BGDV.element_size()


class Gla(AttentionMixer):
    """A window and a gated linear term, each with a share of the output."""

    config: GlaConfig
    needs_keys = True

    def __init__(self, config: GlaConfig, shape: AttentionShape) -> None:
        super().__init__()
        self.config, self.shape = config, shape

    def reset_parameters(self) -> None:
        """Nothing to start."""

    def forward(
        self,
        q_BHUD: Tensor,
        k_BGTD: Tensor,
        v_BGTV: Tensor,
        *keys_BGTD: Tensor,
        scaling: float,
        layout: Layout,
        softcap: float | None = None,
        state: GlaState | None = None,
        need_state: bool = True,
        branch: Branch = "both",
        commit: int | None = None,
    ) -> tuple[Tensor, GlaState | None]:
        """See `AttentionMixer.forward`. A branch alone keeps its share: the two add up to both."""
        share = self.config.window_share
        spec, ring = self._window(scaling, softcap), None if state is None else state.window
        near_BHUV, ring = window_linear(
            q_BHUD, k_BGTD, v_BGTV, spec=spec, layout=layout, state=ring, need_state=need_state, commit=commit
        )
        far_BHUV, memory = self._recall(
            q_BHUD, k_BGTD, v_BGTV, keys_BGTD[0], state, layout=layout, need_state=need_state, commit=commit
        )
        after = None if ring is None or memory is None else GlaState(ring, memory)
        if branch != "both":
            return (share * near_BHUV if branch == "window" else (1 - share) * far_BHUV), after
        return share * near_BHUV + (1 - share) * far_BHUV, after

    def advance(self, *inputs: Tensor, layout: Layout, state: GlaState | None = None) -> GlaState:
        """See `Mixer.advance`: k, v and the keys; the scale of the scores does not enter the state."""
        k_BGTD, v_BGTV, keys_BGTD = inputs
        past = None if state is None else state.window
        assert not isinstance(past, WindowBuffers), "buffers are written by `forward`"
        ring = advance(k_BGTD, v_BGTV, spec=self._window(1.0, None), layout=layout, state=past)
        no_queries = k_BGTD.new_empty(len(k_BGTD), self.shape.num_heads, 0, k_BGTD.shape[-1])
        _, memory = self._recall(no_queries, k_BGTD, v_BGTV, keys_BGTD, state, layout=layout)
        assert memory is not None
        return GlaState(ring, memory)

    def fixed(self, state: GlaState, *, most: int = 1) -> GlaState:
        """See `Mixer.fixed`."""
        assert isinstance(state.window, WindowLinearState)
        return GlaState(WindowBuffers.of(state.window, self._window(1.0, None), most=most), state.memory_BGDV)

    def unfixed(self, state: GlaState) -> GlaState:
        """See `Mixer.unfixed`."""
        assert isinstance(state.window, WindowBuffers)
        return GlaState(state.window.text_state(self._window(1.0, None)), state.memory_BGDV.clone())

    def operations(self, query: Query) -> list[tuple[Dispatcher, Call]]:
        """See `Mixer.operations`."""
        widest, cursor = max(self.shape.head_dim, self.shape.value_dim), "same" if query.past else "none"
        window = query.call(WindowCall, spec=self._window(1.0, None), cursor=cursor, widest=widest)
        return [(WINDOW_LINEAR, window), (DECAY_LINEAR, query.wide().call(Call))]

    def cost(self, element_size: int) -> MixerCost:
        """The window's keys and values, and D V sums per key/value head."""
        shape, width = self.shape, self.shape.head_dim + self.shape.value_dim
        slots = ring_slots(self.config.window, self.config.window_shape)
        memory = shape.head_dim * shape.value_dim
        ring_bytes = shape.num_kv_heads * slots * width * element_size
        return MixerCost(
            state_bytes=ring_bytes + shape.num_kv_heads * memory * max(4, element_size),
            bytes_per_token=0,
            flops_per_token=shape.num_heads * (2 * (slots + 1) * width + 6 * memory),
        )

    def _window(self, scaling: float, softcap: float | None) -> WindowLinear:
        return WindowLinear(window=self.config.window, shape=self.config.window_shape, scaling=scaling, softcap=softcap)

    def _recall(
        self,
        q_BHUD: Tensor,
        k_BGTD: Tensor,
        v_BGTV: Tensor,
        keys_BGTD: Tensor,
        state: GlaState | None,
        *,
        layout: Layout,
        need_state: bool = True,
        commit: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The gated linear term, `[B, H, U, V]`, and its state. Query heads of a group share one: it is kept once."""
        return gated_linear(
            q_BHUD,
            k_BGTD,
            v_BGTV,
            keys_BGTD,
            gate_divisor=self.config.gate_divisor,
            layout=layout,
            state=None if state is None else state.memory_BGDV,
            need_state=need_state,
            commit=commit,
        )
