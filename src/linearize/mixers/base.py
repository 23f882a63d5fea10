"""What every mixer is: a module that mixes a sequence, a frozen config that builds it, a cost it states.

Two kinds. An `AttentionMixer` stands between the projections: the teacher's own module computes q, k, v and the output
projection. A `LayerMixer` (`layer_mixer.py`) stands in the place of the whole attention module.

Letters: B batch, T tokens, H query heads, G key/value heads, D head dimension, V value dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from linearize.ops import tensors
from linearize.ops.dispatch import Call, Dispatcher, Query
from linearize.ops.layout import Layout
from linearize.ops.window_linear import Branch


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """The sizes of the attention that a mixer replaces, and what else of the teacher a mixer needs to know.

    `model_dim`: width of the hidden states. `norm_eps`: epsilon of the teacher's RMS norms. `rope_theta`: base of its
    rotary positions. `qkv_bias`, `output_bias`: whether its projections have biases.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    model_dim: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    output_bias: bool = False

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

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same state with a function applied to each tensor (batch first)."""

    def widened(self, more: int) -> Self:
        """The same state for calls that commit `more` further tokens at once."""


class Decoder(Protocol):
    """A state that tokens are read into one by one, in memory of its own."""

    def continues(self, q_BHUD: Tensor, layout: Layout) -> bool:
        """Whether these are the queries of the one token that it can read next."""

    def step(self, q_BHUD: Tensor, k_BGTD: Tensor, v_BGTV: Tensor) -> Tensor:
        """Read the token; gives its output, `[B, H, 1, V]`."""

    def state(self) -> Any:
        """The state after all tokens read; the decoder is not to be used any more."""


class MixerConfig(BaseModel):
    """Base of the mixers' configs: frozen, keyword-only, nothing unknown accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def reads_projections(self) -> bool:
        """Whether the mixer takes more from an attention module's projections than its attention does."""
        return False

    @property
    def has_two_branches(self) -> bool:
        """Whether the mixer has a window and a linear branch, each of which can run alone."""
        return False

    @property
    def inner(self) -> MixerConfig:
        """The mixer itself, or what runs in the heads that do not keep their softmax attention."""
        return self

    def with_inner(self, inner: MixerConfig) -> MixerConfig:
        """The same with another `inner`."""
        return inner

    def build(self, shape: AttentionShape) -> Mixer:
        """A mixer for attention of this shape, initialised."""
        raise AssertionError(f"{type(self).__name__} has no build method")


class Mixer(nn.Module, ABC):
    """What the two kinds share. All that a mixer remembers goes in and comes out as a state.

    Each kind has `forward` and `advance(*raw inputs, layout=, state=) -> state`, which is what a rollback replays, and
    runs tokens that a cache holds back together with new ones: `commit` says how many go into the state (None: all).
    `time_dim`: the dimension of the raw inputs that counts tokens.
    `fp32_parameters`: names of parameters that stay in fp32 in a bf16 model; None: all of them.
    """

    config: MixerConfig
    shape: AttentionShape
    time_dim: ClassVar[int]
    fp32_parameters: ClassVar[tuple[str, ...] | None] = None

    @abstractmethod
    def cost(self, element_size: int) -> MixerCost:
        """Cost with raw inputs of `element_size` bytes per number."""

    @abstractmethod
    def operations(self, query: Query) -> list[tuple[Dispatcher, Call]]:
        """The operations that such a call runs, with the calls that they see: `linearize inspect --backends`."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Start the new parameters as their paper does."""

    def fixed(self, state: Any, *, most: int = 1) -> Any:
        """The same state in shapes that do not depend on what was read, as a static cache keeps it, for calls that
        commit at most `most` tokens. A mixer may write such a state in place, and returns it then."""
        return state

    def plain(self, state: Any, *, position: int) -> Any:
        """The inverse of `fixed`, for rows that all have read `position` tokens of one document and nothing else."""
        return state

    def put_step(self, memory: Any, row_N: Tensor, state: Any) -> None:
        """Bring rows of `memory`, fixed states of many texts, up to date: `state` is theirs after one more token."""
        for old, new in zip(tensors(memory), tensors(state), strict=True):
            old.index_copy_(0, row_N, new)


class AttentionMixer(Mixer):
    """Mixes q, k, v of a layer. Its raw inputs are k and v, and where `needs_keys` the key projection's output too."""

    time_dim = 2
    needs_keys: ClassVar[bool] = False

    @abstractmethod
    def forward(
        self,
        q_BHUD: Tensor,
        k_BGTD: Tensor,
        v_BGTV: Tensor,
        *keys_BGTD: Tensor,
        scaling: float,
        layout: Layout,
        softcap: float | None = None,
        state: Any = None,
        need_state: bool = True,
        branch: Branch = "both",
        commit: int | None = None,
    ) -> tuple[Tensor, Any]:
        """`y: [B, H, U, V]` and the state after the last token (None unless `need_state`).

        `q_BHUD`: of the last U of the T tokens, which get outputs. `commit`: the state is that after the first `commit`
        tokens, at most T - U (None: after all; where it is 0 there is nothing to return).
        `keys_BGTD`: only where `needs_keys`: the output of the key projection, before norms and rotary positions.
        """

    def decoder(
        self,
        q_BHUD: Tensor,
        k_BGTD: Tensor,
        *,
        scaling: float,
        layout: Layout,
        softcap: float | None = None,
        state: Any = None,
    ) -> Decoder | None:
        """What reads this token and those after it faster than `forward`, to the same values; None: there is
        nothing."""
        return None

    def decodes(self, query: Query) -> bool:
        """Whether one row of such a call has a `decoder`."""
        return False

    @abstractmethod
    def advance(self, k_BGTD: Tensor, v_BGTV: Tensor, *keys_BGTD: Tensor, layout: Layout, state: Any = None) -> Any:
        """The state after these tokens, without outputs."""
