"""What the mixers that run `window_linear` share: call, replay and the cost of a window."""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

from pydantic import model_validator
from torch import Tensor

from linearize.mixers.base import AttentionMixer, AttentionShape, Decoder, MixerConfig, MixerCost
from linearize.ops.dispatch import Call, Dispatcher, Query
from linearize.ops.layout import Layout
from linearize.ops.window_linear import Branch, WindowLinear, WindowLinearState, WindowShape, advance, window_linear
from linearize.ops.window_linear.backends import DISPATCH as WINDOW_LINEAR
from linearize.ops.window_linear.backends import WindowCall
from linearize.ops.window_linear.decoder import WindowDecoder, can_decode, has_decoder
from linearize.ops.window_linear.spec import ring_slots
from linearize.ops.window_linear.state import WindowBuffers


class WindowMixerConfig(MixerConfig):
    """The part of the config that a window needs."""

    window: int
    window_shape: WindowShape
    num_sinks: int

    @model_validator(mode="after")
    def _sinks_fit(self) -> Self:
        if self.num_sinks > self.window:
            raise ValueError(f"num_sinks {self.num_sinks} is larger than window {self.window}: give at most the window")
        return self


class WindowMixer(AttentionMixer):
    """A mixer that is one `window_linear` operation."""

    config: WindowMixerConfig

    def __init__(self, config: WindowMixerConfig, shape: AttentionShape) -> None:
        super().__init__()
        self.config, self.shape = config, shape

    @abstractmethod
    def spec(self, *, scaling: float, softcap: float | None, branch: Branch) -> WindowLinear:
        """The operation that this mixer runs."""

    def forward(  # type: ignore[override]  # takes no keys: `needs_keys` is false
        self,
        q_BHUD: Tensor,
        k_BGTD: Tensor,
        v_BGTV: Tensor,
        *,
        scaling: float,
        layout: Layout,
        softcap: float | None = None,
        state: WindowLinearState | None = None,
        need_state: bool = True,
        branch: Branch = "both",
        commit: int | None = None,
    ) -> tuple[Tensor, WindowLinearState | None]:
        """See `Mixer.forward`."""
        spec = self.spec(scaling=scaling, softcap=softcap, branch=branch)
        return window_linear(
            q_BHUD, k_BGTD, v_BGTV, spec=spec, layout=layout, state=state, need_state=need_state, commit=commit
        )

    def decoder(
        self,
        q_BHUD: Tensor,
        k_BGTD: Tensor,
        *,
        scaling: float,
        layout: Layout,
        softcap: float | None = None,
        state: WindowLinearState | None = None,
    ) -> Decoder | None:
        """See `AttentionMixer.decoder`."""
        if state is None or k_BGTD.shape[::2] != (1, 1) or any(x.is_meta for x in self.parameters()):
            return None  # no decoder for a weight that is offloaded between calls
        spec = self.spec(scaling=scaling, softcap=softcap, branch="both")
        if not can_decode(q_BHUD, k_BGTD, state, spec, layout):
            return None
        return WindowDecoder(state, spec, self.shape.num_heads)

    def decodes(self, query: Query) -> bool:
        """See `AttentionMixer.decodes`."""
        if query.tokens != 1 or not query.past or query.gradients or self.shape.head_dim != self.shape.value_dim:
            return False
        spec = self.spec(scaling=1.0, softcap=None, branch="both")
        return has_decoder(spec, query.device, query.dtype)

    def advance(  # type: ignore[override]
        self, k_BGTD: Tensor, v_BGTV: Tensor, *, layout: Layout, state: WindowLinearState | None = None
    ) -> WindowLinearState:
        """See `Mixer.advance`; the scale of the scores does not enter the state."""
        return advance(
            k_BGTD, v_BGTV, spec=self.spec(scaling=1.0, softcap=None, branch="both"), layout=layout, state=state
        )

    def fixed(self, state: WindowLinearState, *, most: int = 1) -> WindowBuffers:
        """See `Mixer.fixed`."""
        return WindowBuffers.of(state, self.spec(scaling=1.0, softcap=None, branch="both"), most=most)

    def plain(self, state: WindowBuffers, *, position: int) -> WindowLinearState:
        """See `Mixer.plain`."""
        return state.plain(self.spec(scaling=1.0, softcap=None, branch="both"), position)

    def put_step(self, memory: WindowBuffers, row_N: Tensor, state: WindowBuffers) -> None:
        """See `Mixer.put_step`: of most rows that is one slot of the ring."""
        memory.put_step(row_N, state, self.spec(scaling=1.0, softcap=None, branch="both"))

    def operations(self, query: Query) -> list[tuple[Dispatcher, Call]]:
        """See `Mixer.operations`."""
        spec = self.spec(scaling=1.0, softcap=None, branch="both")
        widest = max(self.shape.head_dim, self.shape.value_dim)
        cursor = "same" if query.past else "none"
        return [(WINDOW_LINEAR, query.call(WindowCall, spec=spec, cursor=cursor, widest=widest))]

    def cost(self, element_size: int) -> MixerCost:
        """Ring and sinks of keys and values; scores and weighted sum over the window."""
        config, shape = self.config, self.shape
        slots = ring_slots(config.window, config.window_shape) + config.num_sinks
        width = shape.head_dim + shape.value_dim
        return MixerCost(
            state_bytes=shape.num_kv_heads * slots * width * element_size,
            bytes_per_token=0,
            flops_per_token=2 * shape.num_heads * (slots + 1) * width,
        )
