"""One cache layer for all mixers: a committed state, and while recording, the raw inputs since the commit.

Raw inputs are keys and values where a mixer stands between the projections (transformers calls `update` before the
attention function, which hands them through), and hidden states where it stands in the place of the module. Either way
`step` knows the mixer. Rolling back drops raw inputs; the state itself is never copied or undone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from linearize.modeling.config import MIXER_LAYER
from linearize.ops.layout import Layout

if TYPE_CHECKING:
    from linearize.mixers.base import Mixer

Run = Callable[[Any, bool], tuple[Tensor, Any]]


@dataclass(frozen=True, eq=False)
class Pending:
    """Raw inputs after the committed state: tensors whose dimension `time_dim` counts tokens."""

    inputs: tuple[Tensor, ...]
    time_dim: int
    layout: Layout

    def __len__(self) -> int:
        return self.inputs[0].shape[self.time_dim]

    def part(self, start: int, stop: int) -> Pending:
        """Tokens `start` to `stop`."""
        position = self.layout.position_BT
        layout = Layout(self.layout.start + start, None if position is None else position[:, start:stop])
        return Pending(tuple(x.narrow(self.time_dim, start, stop - start) for x in self.inputs), self.time_dim, layout)

    def then(self, new: Pending) -> Pending:
        """These tokens and the new ones after them."""
        position = None
        if self.layout.position_BT is not None or new.layout.position_BT is not None:
            rows, device = self.inputs[0].shape[0], self.inputs[0].device
            position = torch.cat([x.layout.positions(len(x), device).expand(rows, -1) for x in (self, new)], 1)
        joined = tuple(torch.cat(pair, dim=self.time_dim) for pair in zip(self.inputs, new.inputs, strict=True))
        return Pending(joined, self.time_dim, Layout(self.layout.start, position))

    def map_batch(self, change: Any) -> Pending:
        """The same inputs with `change` applied to each tensor."""
        position = self.layout.position_BT
        layout = Layout(self.layout.start, None if position is None else change(position))
        return Pending(tuple(change(x) for x in self.inputs), self.time_dim, layout)

    @property
    def num_bytes(self) -> int:
        """Bytes of the inputs."""
        return sum(x.numel() * x.element_size() for x in self.inputs)


class MixerCacheLayer(CacheLayerMixin):
    """State of one mixer layer inside transformers' `DynamicCache`."""

    _layer_type = MIXER_LAYER
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.state: Any = None
        self.pending: Pending | None = None
        self.accepted = 0  # of the pending tokens: those that no `crop` can drop any more
        self.record_past = False
        self.cumulative_length = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: the mixer makes its first state."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values through; `step` does the rest."""
        self.is_initialized = True
        return key_states, value_states

    def step(self, mixer: Mixer, inputs: tuple[Tensor, ...], run: Run, *, layout: Layout) -> Tensor:
        """Commit what was accepted, run the mixer over the new tokens, and commit them too unless recording.

        `run(state, need_state)` gives the outputs and the state after them; `inputs` are the new tokens' raw inputs.
        """
        self.is_initialized = True
        self._commit(mixer)
        state = self.state if self.pending is None else self._advanced(mixer, self.pending)
        y, after = run(state, not self.record_past)
        new = Pending(inputs, mixer.time_dim, layout)
        if self.record_past:
            self.pending = new if self.pending is None else self.pending.then(new)
        else:
            self.state, self.pending = after, None
        self.cumulative_length += len(new)
        return y

    def _advanced(self, mixer: Any, raw: Pending) -> Any:
        return mixer.advance(*raw.inputs, layout=raw.layout, state=self.state)

    def _commit(self, mixer: Mixer) -> None:
        if self.pending is None or self.accepted == 0:
            return
        self.state = self._advanced(mixer, self.pending.part(0, self.accepted))
        rest = self.pending.part(self.accepted, len(self.pending))
        self.pending, self.accepted = (rest if len(rest) else None), 0

    def activate_past_recording(self) -> None:
        """From now on keep raw inputs until `crop` says which of them stay."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens (transformers gives a negative number) and accept all others.

        Raises:
            ValueError: tokens that were committed already.
        """
        remove, held = -tokens_to_remove, 0 if self.pending is None else len(self.pending) - self.accepted
        if remove < 0 or remove > held:
            raise ValueError(
                f"cannot drop {remove} tokens, {held} are held back: call `activate_past_recording` before them"
            )
        if self.pending is not None:
            kept = len(self.pending) - remove
            self.pending = self.pending.part(0, kept) if kept else None
            self.accepted = kept
            self.cumulative_length -= remove

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As a full cache would say: kept softmax layers may ask the first layer."""
        return self.cumulative_length + query_length, 0

    def _map_batch(self, change: Any) -> None:
        self.state = None if self.state is None else self.state.map_batch(change)
        self.pending = None if self.pending is None else self.pending.map_batch(change)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows in another order (beam search)."""
        self._map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times."""
        self._map_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some of the rows."""
        self._map_batch(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        """The state is small and stays where it is."""

    def prefetch(self) -> None:
        """Nothing was offloaded."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the state and of what is pending."""
        pending = 0 if self.pending is None else self.pending.num_bytes
        return pending + (0 if self.state is None else int(self.state.num_bytes))
