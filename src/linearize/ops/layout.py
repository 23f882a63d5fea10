"""Where each new token stands in its document: all that an operation must know of padding, packing and past tokens.

Letters: B batch, T new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from linearize.errors import InputError


@dataclass(frozen=True, eq=False)
class Layout:
    """Positions of the T new tokens of a call.

    Plain (`position_BT` is None): no padding, no packing; token t has position `start + t` in every row.
    Ragged: `position_BT` holds each token's position in its own document and -1 on padding. A token whose position
    does not follow
    that of the token before it opens a new document, from which no mixer may look back.
    """

    start: int = 0
    position_BT: Tensor | None = None
    memo: dict[object, object] = field(default_factory=dict, repr=False)

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

        None: none of them does, or only the first of a text. The first token of a call opens one at position 0 alone.
        """
        if self.position_BT is None:
            return None
        position_BT = self.position_BT
        opens_BT = position_BT == 0
        opens_BT[:, 1:] |= (position_BT[:, 1:] != position_BT[:, :-1] + 1) & (position_BT[:, 1:] >= 0)
        return opens_BT

    def live(self) -> Tensor | None:
        """Whether each token is no padding, `[B or 1, T]` bool; None: all are."""
        if self.position_BT is None or bool((self.position_BT >= 0).all()):
            return None
        return self.position_BT >= 0

    @staticmethod
    def from_inputs(
        *, num_tokens: int, past: int, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Layout:
        """Read the layout from what transformers passes to a model.

        `attention_mask: [B, past + T]` of zeros and ones (left padding; right padding only without a past),
        `position_ids: [B, T]`
        (restarting per document when rows are packed), `past`: tokens already in the cache.

        Raises:
            InputError: a mask that is not two-dimensional or has holes between tokens.
        """
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                shape = list(attention_mask.shape)
                raise InputError(
                    f"attention_mask has shape {shape}: a linearized model takes [batch, tokens] of 0 and 1"
                )
            mask = attention_mask.bool()
            _check_no_holes(mask, num_tokens)
            if not bool(mask.all()):
                position_BT = (mask.long().cumsum(-1) - 1)[:, -num_tokens:]
                live = mask[:, -num_tokens:]
                if position_ids is not None:
                    position_BT = position_ids.expand_as(position_BT)
                return Layout(position_BT=position_BT.masked_fill(~live, -1))
        if position_ids is not None:
            plain = torch.arange(past, past + num_tokens, device=position_ids.device)
            if not bool((position_ids == plain).all()):
                return Layout(position_BT=position_ids)
        return Layout(start=past)


def _check_no_holes(mask_BS: Tensor, num_tokens: int) -> None:
    """Refuse masks in which padding follows a token and is followed by one (the state would skip tokens in silence)."""
    drops = mask_BS[:, :-1] & ~mask_BS[:, 1:]
    if not bool(drops.any()):
        return
    trailing = mask_BS.long().cumsum(-1) == mask_BS.long().sum(-1, keepdim=True)
    only_right = (mask_BS | trailing | (mask_BS.long().cumsum(-1) == 0)).all()
    if not bool(only_right) or mask_BS.shape[1] != num_tokens:
        raise InputError("attention_mask has padding between tokens: pad on the left (or on the right without a cache)")
