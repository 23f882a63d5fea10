"""A mixer's state in a page: the tensors of its fixed form, one after the other, as bytes.

A page of zeros is the state before the first token.

Letters: P pages, N of them that a call reads, X numbers of one tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearize.errors import InputError
from linearize.mixers import AttentionMixer, AttentionShape, LayerMixer, Mixer, MixerConfig
from linearize.mixers.base import MixerState
from linearize.mixers.retrieval_heads import RetrievalHeadsConfig
from linearize.modeling.surgery import in_dtype
from linearize.ops import tensors
from linearize.ops.layout import Layout

ALIGNMENT = 64  # bytes: views of every dtype, and loads of whole cache lines


@dataclass(frozen=True, eq=False)
class PageLayout:
    """Where the tensors of a state are in a page of `num_bytes`. `state`: one row of it on meta, in whose order the
    tensors come; `offsets`: bytes in front of each."""

    state: MixerState
    offsets: tuple[int, ...]
    num_bytes: int

    @staticmethod
    def of(mixer: Mixer, dtype: torch.dtype) -> PageLayout:
        """The layout for a mixer whose raw inputs are of a dtype."""
        state = mixer.fixed(_first_state(mixer, dtype)).map_batch(lambda x: x.to("meta"))
        offsets, end = [], 0
        for x in tensors(state):
            offsets.append(end)
            end += -(-x.numel() * x.element_size() // ALIGNMENT) * ALIGNMENT
        return PageLayout(state, tuple(offsets), end)

    def memory(self, pages: Tensor) -> StateMemory:
        """The states in `pages: [P, bytes]` (uint8, rows of at least `num_bytes`)."""
        views = []
        for x, offset in zip(tensors(self.state), self.offsets, strict=True):
            views.append(pages[:, offset : offset + x.numel() * x.element_size()].view(x.dtype))
        return StateMemory(self, tuple(views))


@dataclass(frozen=True, eq=False)
class StateMemory:
    """The states of one layer in all pages: `views_PX`, one for each tensor of a state."""

    layout: PageLayout
    views_PX: tuple[Tensor, ...]

    @property
    def states(self) -> Any:
        """The states in all pages, in their memory."""
        return self._state(self.views_PX)

    def read(self, page_N: Tensor) -> Any:
        """Copies of the states in these pages, batched."""
        return self._state([x.index_select(0, page_N) for x in self.views_PX])

    def shared(self, pages: slice) -> Any:
        """The states in pages of one distance, batched, in the memory of the pages themselves."""
        return self._state([x[pages] for x in self.views_PX])

    def write(self, page_N: Tensor, state: MixerState) -> None:
        """Put states into pages."""
        for view, x in zip(self.views_PX, tensors(state), strict=True):
            view.index_copy_(0, page_N, x.reshape(x.shape[0], -1))

    def write_shared(self, pages: slice, state: MixerState) -> None:
        """Put states into pages of one distance, but for tensors that were written there in place."""
        for view, x in zip(self.views_PX, tensors(state), strict=True):
            rows = view[pages]
            if rows.data_ptr() != x.data_ptr():
                rows.copy_(x.reshape(x.shape[0], -1))

    def _state(self, rows: Sequence[Tensor]) -> Any:
        parts = iter(rows)
        return self.layout.state.map_batch(lambda like: (x := next(parts)).view(x.shape[0], *like.shape[1:]))


def page_layouts(
    plan: Sequence[MixerConfig | None], shapes: Sequence[AttentionShape], dtype: torch.dtype
) -> dict[int, PageLayout]:
    """The layouts of the converted layers, by layer; equal layers share one.

    Raises:
        InputError: a mixer whose state grows with the text.
    """
    layouts: dict[int, PageLayout] = {}
    for layer, (config, shape) in enumerate(zip(plan, shapes, strict=True)):
        if config is None:
            continue
        if isinstance(config, RetrievalHeadsConfig):
            raise InputError(
                f"layer {layer} ({config.name}) holds the whole text for some heads, and vLLM gives a converted layer "
                "one page of constant size: run this student with linearize generate"
            )
        layouts[layer] = _layout(config, shape, dtype)
    return layouts


@functools.cache
def _layout(config: MixerConfig, shape: AttentionShape, dtype: torch.dtype) -> PageLayout:
    """That of one mixer, which is made and run on a token for it; equal layers share one."""
    with torch.device("cpu"), torch.no_grad():
        mixer = in_dtype(config.build(shape).float(), dtype, torch.device("cpu"))
        return PageLayout.of(mixer, dtype)


def page_bytes(layouts: Sequence[PageLayout]) -> int:
    """The size of every layer's page: that of the largest."""
    return max((layout.num_bytes for layout in layouts), default=0)


def _first_state(mixer: Mixer, dtype: torch.dtype) -> MixerState:
    """The state after one token, whatever it is."""
    shape = mixer.shape
    if isinstance(mixer, LayerMixer):
        return mixer.advance(*mixer.project(torch.zeros(1, 1, shape.model_dim, dtype=dtype)), layout=Layout())
    assert isinstance(mixer, AttentionMixer)
    k, v = (torch.zeros(1, shape.num_kv_heads, 1, dim, dtype=dtype) for dim in (shape.head_dim, shape.value_dim))
    state: MixerState = mixer.advance(k, v, *((k,) if mixer.needs_keys else ()), layout=Layout())
    return state
