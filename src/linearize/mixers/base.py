"""What every mixer is: a module that mixes a sequence, a frozen config that builds it, a cost it states.

Letters: B batch, T tokens, H query heads, G key/value heads, D head dimension, V value dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from linearize.ops.layout import Layout
from linearize.ops.window_linear import Branch


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """The sizes of the attention that a mixer replaces."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, kw_only=True)
class MixerCost:
    """What a mixer costs per sequence.

    `state_bytes`: the most a sequence's state holds, whatever its length. `bytes_per_token`: growth per token (0 for
    a linear mixer).
    `flops_per_token`: multiply-adds times two of one decoded token, without projections.
    """

    state_bytes: int
    bytes_per_token: int
    flops_per_token: int


class MixerState(Protocol):
    """A frozen value that says all a mixer remembers of a batch of sequences."""

    @property
    def num_bytes(self) -> int:
        """Bytes held."""

    def map_batch(self, change: Any) -> Any:
        """The same state with a function applied to each tensor (batch first)."""


class MixerConfig(BaseModel):
    """Base of the mixers' configs: frozen, keyword-only, nothing unknown accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def build(self, shape: AttentionShape) -> Mixer:
        """A mixer for attention of this shape, initialised."""
        raise AssertionError(f"{type(self).__name__} has no build method")


class Mixer(nn.Module, ABC):
    """Mixes q, k, v of a layer; all that it remembers goes in and comes out as a state."""

    config: MixerConfig
    shape: AttentionShape

    @abstractmethod
    def forward(
        self,
        q_BHTD: Tensor,
        k_BGTD: Tensor,
        v_BGTV: Tensor,
        *,
        scaling: float,
        layout: Layout,
        softcap: float | None = None,
        state: Any = None,
        need_state: bool = True,
        branch: Branch = "both",
    ) -> tuple[Tensor, Any]:
        """`y: [B, H, T, V]` and the state after the last token (None unless `need_state`)."""

    @abstractmethod
    def advance(self, k_BGTD: Tensor, v_BGTV: Tensor, *, layout: Layout, state: Any = None) -> Any:
        """The state after these tokens, without outputs: what a rollback replays."""

    @abstractmethod
    def cost(self, element_size: int) -> MixerCost:
        """Cost with keys and values of `element_size` bytes."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Start the new parameters as their paper does."""
