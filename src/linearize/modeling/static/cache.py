"""Cache layers of fixed shapes in memory that never moves: what CUDA graphs and `torch.compile` ask of decoding.

Nothing that a step does depends on values. A mixer's layer holds its state and a *tail*: the raw inputs of the tokens
read last, always as many, of which each row's first ones are alive and the rest dead (position -1). A kept softmax
layer holds the token of position p in column p (modulo the columns where it sees a window only), so that tokens which
were taken back are overwritten by those that come in their place, and no mask but the positions is needed.

Letters: B batch, T new tokens, S prompt, C columns, G key/value heads, D head dimension, V value dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from linearize.modeling.cache import Pending, Run
from linearize.ops import tensors
from linearize.ops.layout import Layout

if TYPE_CHECKING:
    from linearize.mixers.base import Mixer, MixerState


@dataclass(frozen=True, eq=False)
class Place:
    """What a step does with the tail. `commit`: it goes into the states first. `column_T`: of the new tokens in it."""

    commit: bool
    column_T: Tensor


class _Layer(CacheLayerMixin):
    """What both kinds share: transformers hands keys and values through, and is told of no past."""

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.filled = False  # whether the prompts were read

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Memory is made when the prompts are read."""

    def begin(self, lengths: Sequence[int]) -> None:
        """The next call brings prompts: row b has `lengths[b]` tokens, padding in front of them."""
        self.filled = False

    def get_seq_length(self) -> int:
        """None: positions are always given."""
        return 0

    def get_max_length(self) -> int:
        """No maximum that transformers must know of."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The prompts see only themselves; steps make no mask."""
        return query_length, 0

    def buffers(self) -> list[Tensor]:
        """All memory that steps write to."""
        raise NotImplementedError


class StaticMixerLayer(_Layer):
    """State and tail of one mixer layer; `tail`: columns of the tail (0: every token goes straight into the state).
    `most`: tokens that go into the state at once, at most."""

    def __init__(self, tail: int, most: int) -> None:
        super().__init__()
        self.tail, self.most = tail, most
        self.state: MixerState | None = None
        self.raw: tuple[Tensor, ...] = ()
        self.time_dim = 0
        self.rows = 0  # that there is memory for

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values through; `step` does the rest."""
        return key_states, value_states

    def step(
        self, mixer: Mixer, inputs: tuple[Tensor, ...], run: Run, *, layout: Layout, place: Place | None
    ) -> Tensor:
        """Run the mixer over the new tokens, whose raw inputs are `inputs`, and give their outputs.

        `layout`: static, of tail and new tokens. Prompts have no `place` and their own layout.
        """
        dim = mixer.time_dim
        new, outputs = Pending(inputs, dim, layout), slice(0, inputs[0].shape[dim])
        if not self.filled or place is None:
            y, state = run(new, state=None, commit=None, need_state=True, outputs=outputs)
            self._fill(mixer.fixed(state, most=self.most), inputs, dim)
            return y
        if not self.tail:
            memory_of_rows = self._first_rows(inputs[0].shape[0])
            y, state = run(new, state=memory_of_rows, commit=None, need_state=True, outputs=outputs)
            copy_state(memory_of_rows, state)
            return y
        whole = tuple(torch.cat(pair, dim=dim) for pair in zip(self.raw, inputs, strict=True))
        commit = self.tail if place.commit else 0
        y, state = run(
            Pending(whole, dim, layout), state=self.state, commit=commit, need_state=place.commit, outputs=outputs
        )
        if place.commit:
            copy_state(self.state, state)
        for memory, x in zip(self.raw, inputs, strict=True):
            memory.index_copy_(dim, place.column_T, x)
        return y

    def _fill(self, state: MixerState, inputs: tuple[Tensor, ...], time_dim: int) -> None:
        """The state after the prompts, in memory of the layer's own."""
        if self.state is None:
            self.time_dim, self.rows = time_dim, inputs[0].shape[0]
            with torch.inference_mode(False):
                self.state = state.map_batch(lambda x: x.clone(memory_format=torch.contiguous_format))
                self.raw = tuple(_zeros(x, time_dim, self.tail) for x in inputs if self.tail)
        else:
            copy_state(self.state, state)
        self.filled = True

    def _first_rows(self, rows: int) -> MixerState:
        """The memory of the first rows, which are those that a step reads."""
        assert self.state is not None
        return self.state if rows == self.rows else self.state.map_batch(lambda x: x[:rows])

    def put(self, row: int, state: MixerState, batch: int) -> None:
        """A row goes on from a state of fixed shapes; `batch`: rows to make memory for at the first call."""
        if self.state is None:
            self.rows = batch
            with torch.inference_mode(False):
                self.state = state.map_batch(lambda x: x.new_zeros(batch, *x.shape[1:]))
        self.filled = True
        for memory, x in zip(tensors(self.state), tensors(state), strict=True):
            memory[row].copy_(x[0])

    def move(self, source: int, target: int) -> None:
        """A row takes another one's place."""
        for memory in tensors(self.state):
            memory[target].copy_(memory[source])

    def row(self, row: int) -> MixerState:
        """The state of one row, in memory of its own."""
        assert self.state is not None
        return self.state.map_batch(lambda x: x[row : row + 1].clone())

    def widen(self, tail: int) -> None:
        """A longer tail, with what is in it."""
        old, self.tail, more = self.tail, tail, max(tail - self.most, 0)
        self.most += more
        with torch.inference_mode(False):
            self.state = self.state.widened(more) if more and self.state is not None else self.state
            wider = tuple(_zeros(x, self.time_dim, tail) for x in self.raw)
        for memory, before in zip(wider, self.raw, strict=True):
            memory.narrow(self.time_dim, 0, old).copy_(before)
        self.raw = wider

    def buffers(self) -> list[Tensor]:
        """State and tail."""
        return [*tensors(self.state), *self.raw]


class StaticAttentionLayer(_Layer):
    """Keys and values of a kept softmax layer, `[B, G, C, .]`; `window`: the last tokens that it sees (None: all)."""

    def __init__(self, columns: int, window: int | None) -> None:
        super().__init__()
        self.columns, self.window = columns, window
        self.is_sliding = window is not None
        self.lengths: Sequence[int] = ()

    def begin(self, lengths: Sequence[int]) -> None:
        """See `_Layer`."""
        super().begin(lengths)
        self.lengths = lengths

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values through; those of the prompts are kept, later ones by `write`."""
        if not self.filled:
            self._fill(key_states, value_states)
        return key_states, value_states

    def _fill(self, k_BGSD: Tensor, v_BGSV: Tensor) -> None:
        if self.keys is None or self.values is None:
            with torch.inference_mode(False):
                self.keys, self.values = (_zeros(x, 2, self.columns) for x in (k_BGSD, v_BGSV))
        for row, length in enumerate(self.lengths):
            count = min(length, self.columns)
            column = torch.arange(length - count, length, device=k_BGSD.device) % self.columns
            for memory, new in ((self.keys, k_BGSD), (self.values, v_BGSV)):
                memory[row].index_copy_(1, column, new[row, :, new.shape[2] - count :])
        self.filled = True

    def write(self, k_BGTD: Tensor, v_BGTV: Tensor, position_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Put the new keys and values at their positions; gives all of the rows that are read."""
        assert self.keys is not None and self.values is not None
        column, rows = (position_BT % self.columns)[:, None, :, None], k_BGTD.shape[0]
        keys, values = self.keys[:rows], self.values[:rows]
        for memory, new in ((keys, k_BGTD), (values, v_BGTV)):
            memory.scatter_(2, column.expand(new.shape), new.to(memory.dtype))
        return keys, values

    def put(self, row: int, k_1GSD: Tensor, v_1GSV: Tensor, length: int, batch: int) -> None:
        """A row goes on from the keys and values of a text of `length` tokens, of which S (the last) are there."""
        if self.keys is None or self.values is None:
            with torch.inference_mode(False):
                self.keys, self.values = (
                    x.new_zeros(batch, x.shape[1], self.columns, x.shape[3]) for x in (k_1GSD, v_1GSV)
                )
        self.filled = True
        count = min(k_1GSD.shape[2], self.columns)
        column = torch.arange(length - count, length, device=k_1GSD.device) % self.columns
        for memory, x in ((self.keys, k_1GSD), (self.values, v_1GSV)):
            memory[row].index_copy_(1, column, x[0, :, x.shape[2] - count :].to(memory.dtype))

    def move(self, source: int, target: int) -> None:
        """A row takes another one's place."""
        assert self.keys is not None and self.values is not None
        for memory in (self.keys, self.values):
            memory[target].copy_(memory[source])

    def row(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values, in memory of their own, of the tokens that the next one sees in a row of `length` tokens."""
        assert self.keys is not None and self.values is not None
        count = length if self.window is None else min(length, self.window - 1)
        column = torch.arange(length - count, length, device=self.keys.device) % self.columns
        return self.keys[row : row + 1].index_select(2, column), self.values[row : row + 1].index_select(2, column)

    def seen(self, position_BT: Tensor) -> Tensor:
        """Which columns each new token sees, `[B, 1, T, C]`; to be asked after `write`."""
        column = torch.arange(self.columns, device=position_BT.device)
        last_B1 = position_BT[:, -1:]
        position_BC = last_B1 - (last_B1 - column) % self.columns  # the position in each column, negative in empty ones
        key, query = position_BC[:, None], position_BT[:, :, None]
        seen = (key >= 0) & (key <= query)
        return (seen if self.window is None else seen & (key > query - self.window))[:, None]

    def lengthen(self, columns: int) -> None:
        """More columns for a layer that sees the whole text."""
        assert self.window is None
        old, self.columns = self.columns, columns
        if self.keys is None or self.values is None:
            return
        with torch.inference_mode(False):
            longer = [_zeros(x, 2, columns) for x in (self.keys, self.values)]
        for memory, before in zip(longer, (self.keys, self.values), strict=True):
            memory[:, :, :old].copy_(before)
        self.keys, self.values = longer

    def buffers(self) -> list[Tensor]:
        """None that a step must find as it was: what it writes, it writes before it reads."""
        return []


class StepCache(Cache):
    """The layers of a model, of the kinds above."""

    layers: list[Any]

    def begin(self, lengths: Sequence[int]) -> None:
        """The next call reads prompts of so many tokens."""
        for layer in self.layers:
            layer.begin(lengths)

    @property
    def mixer_layers(self) -> list[StaticMixerLayer]:
        """Those of mixers."""
        return [layer for layer in self.layers if isinstance(layer, StaticMixerLayer)]

    @property
    def whole_layers(self) -> list[StaticAttentionLayer]:
        """Those that hold the whole text: they alone limit how long it may get."""
        return [layer for layer in self.layers if isinstance(layer, StaticAttentionLayer) and layer.window is None]


def copy_state(memory: MixerState | None, new: MixerState | None) -> None:
    """Put a state into the memory of another one of the same shapes (an operation may have written there itself)."""
    if new is memory:
        return
    for old, x in zip(tensors(memory), tensors(new), strict=True):
        assert old.shape == x.shape, f"a state changed its shape from {list(old.shape)} to {list(x.shape)}"
        old.copy_(x)


def _zeros(like: Tensor, dim: int, size: int) -> Tensor:
    shape = list(like.shape)
    shape[dim] = size
    return like.new_zeros(shape)
