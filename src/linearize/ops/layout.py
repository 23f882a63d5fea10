"""Where each new token stands in its document: all that an operation must know of padding, packing and past tokens.

Letters: B batch, T new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from linearize.errors import InputError

MOST = 2**62  # beyond every position


@dataclass(frozen=True, eq=False)
class Layout:
    """Positions of the T new tokens of a call.

    Plain (`position_BT` is None): no padding, no packing; token t has position `start + t` in every row.
    Ragged: `position_BT` holds each token's position in its own document and -1 on dead tokens (padding, and draft
    tokens that a row of the batch did not keep). A token whose position does not follow that of the last live token
    before it opens a new document, from which no mixer may look back.
    Static (`tail` is not None): ragged, and known without reading the positions: no token opens a document, and only
    the first `tail` tokens may be dead, each row's live ones in front. Every shape then follows from sizes alone, and
    no call waits for the device, as CUDA graphs demand.
    `memo`: what was computed from the layout, once for all layers.
    """

    start: int = 0
    position_BT: Tensor | None = None
    tail: int | None = None
    memo: dict[object, Any] = field(default_factory=dict, repr=False)

    @property
    def is_plain(self) -> bool:
        """Whether every row is one unbroken run of tokens that starts at the same position."""
        return self.position_BT is None

    def positions(self, num_tokens: int, device: torch.device) -> Tensor:
        """Positions as a tensor, `[1, T]` when plain and `[B, T]` otherwise."""
        if self.position_BT is not None:
            return self.position_BT
        return torch.arange(self.start, self.start + num_tokens, device=device)[None]

    def starts(self, num_tokens: int, device: torch.device) -> Tensor | None:
        """Whether each token opens a document, so that nothing may be carried into it: `[B or 1, T]` bool.

        None: none of them does, or only the first of a text. The first live token of a call opens one at position 0
        alone.
        """
        if self.position_BT is None or self.tail is not None:
            return None
        if "starts" not in self.memo:
            self.memo["starts"] = _starts(self.position_BT)
        opens_BT: Tensor = self.memo["starts"]
        return opens_BT

    def live(self) -> Tensor | None:
        """Whether each token is alive (no padding, not dropped), `[B or 1, T]` bool; None: all are."""
        if self.position_BT is None or self.tail == 0:
            return None
        if "live" not in self.memo:
            live_BT = self.position_BT >= 0
            self.memo["live"] = live_BT if self.tail is not None or not bool(live_BT.all()) else None
        alive_BT: Tensor | None = self.memo["live"]
        return alive_BT

    def gaps(self) -> bool:
        """Whether dead tokens stand between tokens of one document (or between past tokens and new ones)."""
        if self.position_BT is not None and self.tail is not None:
            return 0 < self.tail < self.position_BT.shape[1]
        if self.position_BT is None or (live_BT := self.live()) is None:
            return False
        if "gaps" not in self.memo:
            opens_BT = self.starts(self.position_BT.shape[1], self.position_BT.device)
            assert opens_BT is not None
            self.memo["gaps"] = bool((live_BT[:, 1:] & ~live_BT[:, :-1] & ~opens_BT[:, 1:]).any())
        has_gaps: bool = self.memo["gaps"]
        return has_gaps

    def following(self) -> Tensor:
        """Of a static layout: the position of each row's first live token, `[B]`, contiguous."""
        assert self.position_BT is not None and self.tail is not None
        if "following" not in self.memo:
            position = self.position_BT
            first_B = position[:, 0] if self.tail == 0 else position.masked_fill(position < 0, MOST).amin(1)
            self.memo["following"] = first_B.contiguous()
        following_B: Tensor = self.memo["following"]
        return following_B

    def live_first(self) -> Tensor:
        """The live tokens of each row in their order, then the dead ones, `[B, T]`."""
        assert self.position_BT is not None
        if "live first" not in self.memo:
            self.memo["live first"] = (self.position_BT < 0).long().argsort(dim=1, stable=True)
        order_BT: Tensor = self.memo["live first"]
        return order_BT

    def know(self, following_B: Tensor, live_BT: Tensor | None) -> None:
        """Take `following` and `live_first` as they were computed elsewhere."""
        self.memo["following"] = following_B
        if live_BT is not None:
            self.memo["live first"] = live_BT

    def part(self, start: int, stop: int) -> Layout:
        """The layout of the tokens `start` to `stop`."""
        key = ("part", start, stop)
        if key not in self.memo:
            position = None if self.position_BT is None else self.position_BT[:, start:stop]
            tail = None if self.tail is None else min(max(self.tail - start, 0), stop - start)
            self.memo[key] = Layout(self.start + start, position, tail)
        layout: Layout = self.memo[key]
        return layout

    def then(self, new: Layout, num_tokens: tuple[int, int], rows: int, device: torch.device) -> Layout:
        """The layout of these tokens and the new ones after them; `num_tokens`: of both."""
        key = ("then", self)
        if key not in new.memo:
            new.memo[key] = _joined(self, new, num_tokens, rows, device)
        layout: Layout = new.memo[key]
        return layout

    def keeping(self, counts_B: Sequence[int], first: int, num_tokens: int, device: torch.device) -> Layout:
        """The same tokens, of which row b keeps the first `counts_B[b]` from token `first` on: the rest are dead."""
        key = ("keeping", tuple(counts_B), first, num_tokens)
        if key not in self.memo:
            count = torch.tensor(counts_B, device=device)[:, None]
            dead = torch.arange(num_tokens, device=device) - first >= count
            position = self.positions(num_tokens, device).expand(len(counts_B), -1)
            self.memo[key] = Layout(position_BT=position.masked_fill(dead, -1))
        layout: Layout = self.memo[key]
        return layout

    def opens_inside(self, num_tokens: int, device: torch.device) -> bool:
        """Whether a document opens behind the first token of a row: rows are packed."""
        starts_BT = self.starts(num_tokens, device)
        if starts_BT is None:
            return False
        if "opens_inside" not in self.memo:
            live_BT = self.live()
            first = (torch.ones_like(starts_BT) if live_BT is None else live_BT).long().cumsum(-1) == 1
            self.memo["opens_inside"] = bool((starts_BT & ~first).any())
        opens: bool = self.memo["opens_inside"]
        return opens

    @staticmethod
    def from_inputs(
        *,
        num_tokens: int,
        past: int,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_is_packed: bool = False,
    ) -> Layout:
        """Read the layout from what transformers passes to a model.

        `attention_mask: [B, past + T]` of zeros and ones: the new tokens may have padding on one side; what is padding
        among the past ones was said when they were new. `position_ids: [B, T]`, restarting per document when rows are
        packed. `past`: tokens already in the cache; `past_is_packed`: several documents of a row are among them, so
        that the next position is not their number. Where no position restarts, tokens are counted, wherever the
        positions begin.

        Raises:
            InputError: a mask that is not two-dimensional, of another length, or with holes between new tokens.
        """
        if attention_mask is None and position_ids is not None:
            if _is_plain(position_ids, past):
                return Layout(start=past)
            if past_is_packed:
                return Layout(position_BT=position_ids)
            attention_mask = torch.ones(1, past + num_tokens, dtype=torch.bool, device=position_ids.device)
            attention_mask = attention_mask.expand(position_ids.shape[0], -1)
        if attention_mask is not None:
            mask = _checked_mask(attention_mask, past + num_tokens, num_tokens)
            all_live = bool(mask.all())
            if all_live and (position_ids is None or _is_plain(position_ids, past)):
                return Layout(start=past)
            live = mask[:, -num_tokens:]
            counted_BT = mask.long().cumsum(-1)[:, -num_tokens:] - 1
            if position_ids is None or not _restarts(position_ids.expand_as(live), counted_BT, live):
                return Layout(start=past) if all_live else Layout(position_BT=counted_BT.masked_fill(~live, -1))
            return Layout(position_BT=position_ids.expand_as(live).masked_fill(~live, -1))
        return Layout(start=past)


def _is_plain(position_BT: Tensor, past: int) -> bool:
    """Whether every row goes on at position `past`, one by one."""
    return bool((position_BT == torch.arange(past, past + position_BT.shape[1], device=position_BT.device)).all())


def _restarts(position_BT: Tensor, counted_BT: Tensor, live_BT: Tensor) -> bool:
    """Whether a live token opens a document: its position does not come after that of the live one before it, or is 0
    behind past tokens."""
    opens_BT = (position_BT[:, :1] == 0) & (counted_BT[:, :1] > 0) & live_BT[:, :1]
    if position_BT.shape[1] > 1:
        furthest_BT = position_BT.masked_fill(~live_BT, -1).cummax(-1).values
        inside_BT = live_BT[:, 1:] & (position_BT[:, 1:] <= furthest_BT[:, :-1])
        opens_BT = torch.cat([opens_BT, inside_BT], dim=1)
    return bool(opens_BT.any())


def _starts(position_BT: Tensor) -> Tensor:
    """`Layout.starts` of a ragged layout: each live token against the last live one before it."""
    live_BT, opens_BT = position_BT >= 0, position_BT == 0
    slot = torch.arange(position_BT.shape[1], device=position_BT.device)
    before_BT = torch.where(live_BT, slot, -1)[:, :-1].cummax(1).values
    follows_BT = position_BT.gather(1, before_BT.clamp(min=0)) + 1
    opens_BT[:, 1:] |= live_BT[:, 1:] & (before_BT >= 0) & (position_BT[:, 1:] != follows_BT)
    return opens_BT


def _joined(old: Layout, new: Layout, num_tokens: tuple[int, int], rows: int, device: torch.device) -> Layout:
    """`Layout.then`.

    Raises:
        InputError: a new token that does not follow the last one that its row kept.
    """
    if old.is_plain and new.is_plain and new.start == old.start + num_tokens[0]:
        return Layout(old.start)
    parts = [x.positions(n, device).expand(rows, -1) for x, n in zip((old, new), num_tokens, strict=True)]
    joined = Layout(position_BT=torch.cat(parts, dim=1))
    assert joined.position_BT is not None
    opens = _starts(joined.position_BT)[:, num_tokens[0]] & (joined.position_BT[:, num_tokens[0]] > 0)
    if bool(opens.any()):
        raise InputError(
            "the new tokens do not follow the last ones that each row of the cache kept: give the attention_mask with "
            "zeros where a row dropped its draft tokens (accept_rows returns it)"
        )
    return joined


def _checked_mask(attention_mask: Any, columns: int, num_tokens: int) -> Tensor:
    """The mask as `[B, past + T]` bool.

    Raises:
        InputError: another form of mask, or padding between new tokens.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or attention_mask.shape[1] != columns:
        shape = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise InputError(
            f"attention_mask is {shape}: a linearized model takes [batch, {columns}] of 0 and 1 (past and new tokens)"
        )
    mask = attention_mask.bool()
    new = mask[:, -num_tokens:]
    if bool(((new[:, 1:] != new[:, :-1]).sum(-1) > 1).any()):
        raise InputError("attention_mask has padding between new tokens: pad them on the left, or on the right")
    return mask
