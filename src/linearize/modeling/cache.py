"""One cache layer for all mixers: a committed state, and while recording, the raw inputs since the commit.

Raw inputs are what the projections gave: keys and values where a mixer stands between them (transformers calls `update`
before the attention function, which hands them through), and what `project` gives where it stands in the place of the
module. Rolling back drops raw inputs; the state itself is never copied or undone. What was accepted goes into the state
inside the next call, which runs accepted and new tokens as one (The Mamba in the Llama, 2408.15237, algorithm 2).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, Unpack

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from linearize.errors import InputError
from linearize.modeling.config import MIXER_LAYER
from linearize.modeling.library_internals import register_cache_layer
from linearize.ops.layout import Layout

if TYPE_CHECKING:
    from linearize.mixers.base import Decoder, Mixer, MixerState
    from linearize.ops.window_linear import Branch

HELD = 128  # the most tokens of one call that wait for `crop`: more are a prompt, not a draft


class RunOptions(TypedDict):
    """Keywords that a cache layer calls a mixer with: see `Mixer`."""

    state: MixerState | None
    commit: int | None
    need_state: bool


class Run(Protocol):
    """Runs a mixer over raw inputs, with outputs for the new tokens `outputs` (a slice of them), the last of `raw`."""

    def __call__(
        self, raw: Pending, *, state: MixerState | None, commit: int | None, need_state: bool, outputs: slice
    ) -> tuple[Tensor, MixerState | None]: ...


@dataclass(slots=True, eq=False)
class DecodingRun:
    """A `Run` of a mixer between projections, which may have a decoder for one token after another.

    `query_BHTD`: of the new tokens.
    """

    mixer: Any
    query_BHTD: Tensor
    branch: Branch
    scaling: float
    softcap: float | None

    def __call__(
        self, raw: Pending, *, outputs: slice, **options: Unpack[RunOptions]
    ) -> tuple[Tensor, MixerState | None]:
        """See `Run`."""
        named = {"layout": raw.layout, "branch": self.branch, "scaling": self.scaling, "softcap": self.softcap}
        y_and_state: tuple[Tensor, MixerState | None] = self.mixer(
            self.query_BHTD[:, :, outputs], *raw.inputs, **named, **options
        )
        return y_and_state

    def decoder(self, inputs: tuple[Tensor, ...], state: MixerState | None, layout: Layout) -> Decoder | None:
        """The mixer's decoder for this token and those after it; None where it has none."""
        if len(inputs) != 2:
            return None
        options = {"scaling": self.scaling, "softcap": self.softcap}
        made: Decoder | None = self.mixer.decoder(self.query_BHTD, inputs[0], state=state, layout=layout, **options)
        return made

    @property
    def may_decode(self) -> bool:
        """Whether a decoder gives the same: both branches, and no hook waits for the mixer's calls."""
        return self.branch == "both" and not self.mixer._forward_hooks and not self.mixer._forward_pre_hooks

    @property
    def kind(self) -> tuple[object, float, float | None]:
        """What runs have in common that one decoder serves."""
        return self.mixer, self.scaling, self.softcap


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
        if start == 0 and stop == len(self):
            return self
        taken = tuple(x.narrow(self.time_dim, start, stop - start) for x in self.inputs)
        return Pending(taken, self.time_dim, self.layout.part(start, stop))

    def then(self, new: Pending) -> Pending:
        """These tokens and the new ones after them."""
        first = self.inputs[0]
        layout = self.layout.then(new.layout, (len(self), len(new)), first.shape[0], first.device)
        joined = tuple(torch.cat(pair, dim=self.time_dim) for pair in zip(self.inputs, new.inputs, strict=True))
        return Pending(joined, self.time_dim, layout)

    def keeping(self, counts_B: Sequence[int], first: int) -> Pending:
        """The same tokens, of which row b keeps the first `counts_B[b]` from token `first` on: the rest are dead."""
        layout = self.layout.keeping(counts_B, first, len(self), self.inputs[0].device)
        return Pending(self.inputs, self.time_dim, layout)

    def owned(self) -> Pending:
        """The same inputs in memory of their own: a view would keep what was dropped alive."""
        return Pending(tuple(_owned(x) for x in self.inputs), self.time_dim, self.layout)

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> Pending:
        """The same inputs with `change` applied to each tensor."""
        position = self.layout.position_BT
        if position is not None:
            position = change(position.expand(self.inputs[0].shape[0], -1))
        return Pending(tuple(change(x) for x in self.inputs), self.time_dim, Layout(self.layout.start, position))

    @property
    def num_bytes(self) -> int:
        """Bytes of the inputs."""
        return sum(x.numel() * x.element_size() for x in self.inputs)


def _owned(x: Tensor) -> Tensor:
    return x if x.untyped_storage().nbytes() == x.numel() * x.element_size() else x.clone()


class MixerCacheLayer(CacheLayerMixin):
    """State of one mixer layer inside transformers' `DynamicCache`, or its `StaticCache`: it does not grow."""

    _layer_type = MIXER_LAYER
    _decoder: Decoder | None = None  # of tokens after the last state
    _decoder_of: tuple[object, float, float | None] | None = None
    _config: object | None = None  # of the mixer whose state it is
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, **_: object) -> None:
        """Keywords are what transformers tells every layer of a cache (`max_cache_len`): nothing here has a size."""
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.state = None
        self._config = None
        self.pending: Pending | None = None
        self.accepted = 0  # pending tokens that no `crop` can drop any more: none of them, or all
        self.has_dead = False  # whether a column may be dead in some row: padding, or tokens that it did not keep
        self.is_packed = False  # whether a row holds several documents
        self.record_past = False
        self.cumulative_length = 0
        self.is_initialized = False
        self._last_pass: weakref.ref[object] | None = None

    @property
    def state(self) -> MixerState | None:
        """What the mixer remembers of the tokens that are committed. To ask for it ends a decoder: it is a value."""
        if self._decoder is not None:
            self.state = self._decoder.state()
        return self._state

    @state.setter
    def state(self, state: MixerState | None) -> None:
        self._state, self._decoder, self._decoder_of = state, None, None

    def __getstate__(self) -> dict[str, object]:
        """Copies hold the state, not the decoder."""
        self.state = self.state
        return vars(self).copy()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: the mixer makes its first state."""
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values through; `step` does the rest."""
        self.is_initialized = True
        return key_states, value_states

    def enter(self, forward_pass: object) -> None:
        """Note which forward pass is at this layer.

        Raises:
            InputError: the same one again, as when activations are recomputed: the state is that after its tokens.
        """
        if self._last_pass is not None and self._last_pass() is forward_pass:
            raise InputError(
                "a layer ran twice in one forward pass (activations are recomputed), and its cache holds the tokens "
                "already: train with use_cache=False"
            )
        self._last_pass = weakref.ref(forward_pass)

    def step(self, mixer: Mixer, inputs: tuple[Tensor, ...], run: Run, *, layout: Layout) -> Tensor:
        """Run the mixer over the new tokens, whose raw inputs are `inputs`, and give their outputs.

        The same call takes the accepted tokens into the state, and the new ones too unless recording. While recording,
        all but the last `HELD` tokens of a longer call are taken in as well: no draft is as long.

        Raises:
            InputError: the mixer was given a store or softmax heads after earlier tokens.
        """
        self.is_initialized = True
        if mixer.config is not self._config:
            self._check_config(mixer.config)
        if isinstance(run, DecodingRun) and (y := self._decoded(inputs, run, layout)) is not None:
            return y
        new = Pending(inputs, mixer.time_dim, layout)
        if not layout.is_plain:
            self.has_dead = self.has_dead or layout.live() is not None
            self.is_packed = self.is_packed or layout.opens_inside(len(new), inputs[0].device)
        tokens, ys = len(new), []
        if self.record_past and tokens > HELD:
            early = tokens - HELD
            ys.append(self._run(new.part(0, early), run, slice(0, early), commit_all=True))
            ys.append(self._run(new.part(early, tokens), run, slice(early, tokens), commit_all=False))
        else:
            ys.append(self._run(new, run, slice(0, tokens), commit_all=not self.record_past))
        self.cumulative_length += tokens
        return ys[0] if len(ys) == 1 else torch.cat(ys, dim=mixer.time_dim)

    def _check_config(self, config: object) -> None:
        """Refuse another mixer than that of the tokens before."""
        if self._config is not None and self.cumulative_length and config != self._config:
            raise InputError(
                f"a cache of {self.cumulative_length} tokens was filled by {self._config}, and the layer has {config} "
                "now: begin with a new cache"
            )
        self._config = config

    def _decoded(self, inputs: tuple[Tensor, ...], run: DecodingRun, layout: Layout) -> Tensor | None:
        """The next token's outputs by a decoder; None where there is none for it."""
        if self.record_past or self.pending is not None or not run.may_decode:
            return None
        decoder = self._decoder
        if decoder is None or run.kind != self._decoder_of or not decoder.continues(run.query_BHTD, layout):
            decoder = run.decoder(inputs, self.state, layout)
            if decoder is None:
                return None
            self._decoder, self._state = decoder, None
            self._decoder_of = run.kind
        self.cumulative_length += 1
        return decoder.step(run.query_BHTD, *inputs)

    def _run(self, new: Pending, run: Run, outputs: slice, *, commit_all: bool) -> Tensor:
        """One call of the mixer over what is pending and the new tokens; `accepted` of them, or all, are committed."""
        whole = new if self.pending is None else self.pending.then(new)
        commit = None if commit_all else self.accepted
        y, after = run(whole, state=self.state, commit=commit, need_state=commit != 0, outputs=outputs)
        if commit != 0:
            self.state = after
        if commit_all:
            self.pending = None
        elif self.pending is None or self.accepted:
            self.pending = new.owned()
        else:
            self.pending = whole
        self.accepted = 0
        return y

    def activate_past_recording(self) -> None:
        """From now on keep raw inputs until `crop` or `accept` says which of them stay."""
        self.record_past = True

    @property
    def held(self) -> int:
        """Tokens that wait for `crop` or `accept`."""
        return 0 if self.pending is None else len(self.pending) - self.accepted

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens (transformers gives a negative number) and accept all others.

        Raises:
            ValueError: tokens that were committed already.
        """
        remove = -tokens_to_remove
        if remove < 0 or remove > self.held:
            raise ValueError(
                f"cannot drop {remove} tokens, {self.held} are held back: call `activate_past_recording` before them"
            )
        if self.pending is not None:
            kept = len(self.pending) - remove
            self.pending = self.pending.part(0, kept) if kept else None
            self.accepted = kept
            self.cumulative_length -= remove

    def accept(self, counts_B: Sequence[int] | Tensor) -> None:
        """Row b keeps the first `counts_B[b]` of the tokens held back; its others are dead: it never saw them.

        Columns that no row keeps are dropped, as `crop` does.

        Raises:
            InputError: counts for another number of rows, or of more tokens than are held back.
        """
        counts = counts_B.tolist() if isinstance(counts_B, Tensor) else list(counts_B)
        rows = len(counts) if self.pending is None else self.pending.inputs[0].shape[0]
        if len(counts) != rows or not all(0 <= count <= self.held for count in counts):
            raise InputError(f"accept {counts}: give {rows} counts, each from 0 to the {self.held} tokens held back")
        first, most = self.accepted, max(counts, default=0)
        self.crop(most - self.held)
        if self.pending is not None and min(counts) < most:
            self.pending, self.has_dead = self.pending.keeping(counts, first), True

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As a full cache would say: transformers asks the first layer for the mask of kept softmax layers."""
        return self.cumulative_length + query_length, 0

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
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


register_cache_layer(MIXER_LAYER, MixerCacheLayer)
