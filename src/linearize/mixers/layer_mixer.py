"""Mixers that stand in the place of a whole attention module and start from its projections (2408.15237, section 2).

Letters: B batch, T tokens, M model width, H query heads, G key/value heads, D head dimension, V value dimension, R rows
of a projection.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Required, TypedDict

import torch
from torch import Tensor

from linearize.mixers.base import Mixer, MixerConfig
from linearize.ops import TensorState
from linearize.ops.layout import Layout
from linearize.ops.recurrent.front_end import RecurrenceOptions

Initialise = Literal["copy", "calibrate", "random"]


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """The four projections of a teacher's attention: `q: [H D, M]`, `k: [G D, M]`, `v: [G V, M]`, `o: [M, H V]`, and
    their biases (None: none)."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class AttentionSample:
    """What a teacher's attention module did on a batch of text: what gates are calibrated from.

    `hidden_BTM`: its input. `output_BTM`: its output. `q_BHTD`, `k_BGTD`, `v_BGTV`: after norms and rotary positions.
    `y_BHTV`: attention before the output projection. `scaling`, `softcap`: of the scores. `window`: tokens that the
    teacher limits this layer to (None: none).
    """

    hidden_BTM: Tensor
    output_BTM: Tensor
    q_BHTD: Tensor
    k_BGTD: Tensor
    v_BGTV: Tensor
    y_BHTV: Tensor
    scaling: float
    layout: Layout
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, eq=False)
class RecurrentState(TensorState):
    """What a recurrent layer remembers.

    `memory`: its sums, at least fp32, batch first. `taps: [B, taps - 1, channels]`: the last inputs of the short
    convolution, oldest first (None without one).
    """

    memory: Tensor
    taps: Tensor | None = None


class MixOptions(TypedDict, total=False):
    """Keywords of `LayerMixer.mix` besides `outputs`."""

    layout: Required[Layout]
    state: RecurrentState | None
    need_state: bool
    commit: int | None


def recurrence_options(options: MixOptions) -> RecurrenceOptions:
    """What a layer's recurrence is called with: the memory of the state alone."""
    state = options.get("state")
    return {
        "layout": options["layout"],
        "state": None if state is None else state.memory,
        "need_state": options.get("need_state", True),
        "commit": options.get("commit"),
    }


class LayerMixerConfig(MixerConfig):
    """Base of the configs of layer mixers.

    `initialise`: `copy` starts the projections from the teacher's (published); `calibrate` also sets decay, write
    strength and output scale from the teacher's attention on a few batches; `random` starts everything anew (the
    ablation).
    """

    initialise: Initialise = "copy"

    @property
    def reads_projections(self) -> bool:
        """See `MixerConfig`: it starts from them."""
        return self.initialise != "random"


class LayerMixer(Mixer):
    """Takes the hidden states of a layer and gives what the attention module would.

    Its raw inputs are what `project` gives, so that no hidden state is projected twice.
    """

    config: LayerMixerConfig
    time_dim = 1

    def forward(
        self,
        hidden_BTM: Tensor,
        *,
        layout: Layout,
        state: RecurrentState | None = None,
        need_state: bool = True,
        cached: Callable[[tuple[Tensor, ...]], Tensor] | None = None,
    ) -> tuple[Tensor, RecurrentState | None]:
        """`y: [B, T, M]`, output projection included, and the state after the last token (None unless `need_state`).

        `cached`: gives y from the raw inputs in the place of `mix`, and keeps the state. A cache calls `mix` inside of
        it, so that weights which are elsewhere between the calls of a module (accelerate's offload) are there.
        """
        projected = self.project(hidden_BTM)
        if cached is not None:
            return cached(projected), None
        return self.mix(*projected, layout=layout, state=state, need_state=need_state)

    @abstractmethod
    def project(self, hidden_BTM: Tensor) -> tuple[Tensor, ...]:
        """The raw inputs: what the input projections make of the hidden states, each `[B, T, ...]`."""

    @abstractmethod
    def mix(
        self,
        *projected: Tensor,
        layout: Layout,
        state: RecurrentState | None = None,
        need_state: bool = True,
        commit: int | None = None,
        outputs: int | None = None,
    ) -> tuple[Tensor, RecurrentState | None]:
        """`y: [B, U, M]` of the last U = `outputs` tokens (None: of all), and the state.

        `commit`: the state is that after the first `commit` tokens (None: after all; no state unless `need_state`).
        """

    @abstractmethod
    def advance(self, *projected: Tensor, layout: Layout, state: RecurrentState | None = None) -> RecurrentState:
        """The state after these tokens, without outputs."""

    @abstractmethod
    def start_from(self, weights: AttentionWeights) -> None:
        """Copy the teacher's projections; what is new keeps the start that `reset_parameters` gave it."""

    @abstractmethod
    def matrix(self, hidden_BTM: Tensor, *, layout: Layout) -> Tensor:
        """The mixing matrices `[B, H, T, T]`: what stands in the place of the attention weights (2408.10189)."""

    def calibrate(self, samples: Sequence[AttentionSample]) -> None:
        """Set decay, write strength and output scale from the teacher's attention; called after `start_from`.

        Raises:
            InputError: a mixer that has nothing to calibrate.
        """
        from linearize.errors import InputError

        raise InputError(
            f"mixer {self.config.name} cannot be calibrated: set initialise to copy or random"  # type: ignore[attr-defined]
        )


def copy_rows(target: Tensor, *parts: tuple[int, Tensor | None]) -> None:
    """Copy blocks of rows into `target: [R, ...]`: each part is the row it starts at and its rows (None: zeros are
    left)."""
    with torch.no_grad():
        for start, rows in parts:
            if rows is not None:
                target[start : start + rows.shape[0]].copy_(rows)


def last(x_BT: Tensor, outputs: int | None) -> Tensor:
    """The last tokens of `[B, T, ...]` (None: all)."""
    return x_BT if outputs is None else x_BT[:, x_BT.shape[1] - outputs :]
