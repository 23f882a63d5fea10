"""A model with its cache: reads tokens, and rolls back those that are rejected.

Letters: B batch, T tokens, S columns of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from linearize.errors import InputError
from linearize.modeling.cache import MixerCacheLayer
from linearize.modeling.cache_argument import with_cache
from linearize.modeling.forward_call import last_logits
from linearize.modeling.library_internals import hide_old_states, keeps_recurrent_state
from linearize.modeling.ragged_cache import accept_rows, compact

MAX_DEAD_COLUMNS = 64  # dead columns that a cache holds before they are taken out


class CachedModel:
    """Reads a batch of texts with one cache; `keep` says how many of the tokens read since the last `keep` stay.

    `passes`: forward passes so far. `lengths`: tokens of each row in the cache. `by_row`: whether rows may keep
    different numbers of tokens.
    """

    def __init__(self, model: PreTrainedModel, role: str) -> None:
        """Raises InputError for a model whose cache cannot roll back; `role` names it in the message."""
        check_rollback(model, role)
        self.model, self.role = model, role
        self.cache: Any = DynamicCache(config=model.config)
        self.passes = 0
        self.by_row = all(_keeps_by_row(layer) for layer in self.cache.layers)
        self._mask_BS: Tensor | None = None  # None: every column is a token in every row
        self.lengths: list[int] = []
        self._undecided = 0  # tokens read that `keep` has not decided on

    def read_prompt(self, input_ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Read the prompts (padding on the left); return the logits after them, `[B, 1, V]`."""
        self.lengths = [0] * input_ids_BT.shape[0]
        if mask_BT is not None and not bool(mask_BT.all()):
            self._mask_BS = mask_BT[:, :0].long()
        logits_B1V = self._forward(input_ids_BT, mask_BT if self._mask_BS is not None else None, prompt=True)[:, -1:]
        self._undecided = 0
        check_layers(self.cache, self.role)
        self.cache.activate_past_recording()
        hide_old_states(self.cache)
        self.by_row = all(_keeps_by_row(layer) for layer in self.cache.layers)
        return logits_B1V

    def read(self, tokens_BT: Tensor, *, settled: bool = False) -> Tensor:
        """Read further tokens; return the logits after each, `[B, T, V]`.

        `settled`: they belong to the text, and the next `keep` keeps them all: mixers commit them to their states at
        once, as plain decoding does.
        """
        new_BT = None if self._mask_BS is None else torch.ones_like(tokens_BT)
        mixers = [layer for layer in self.cache.layers if settled and isinstance(layer, MixerCacheLayer)]
        for layer in mixers:
            layer.record_past = False
        logits_BTV = self._forward(tokens_BT, new_BT, prompt=False)
        for layer in mixers:
            layer.record_past = True
        return logits_BTV

    def _forward(self, tokens_BT: Tensor, new_BT: Tensor | None, *, prompt: bool) -> Tensor:
        self.passes += 1
        added, positions = [tokens_BT.shape[1]] * len(self.lengths), {}
        if new_BT is not None:
            assert self._mask_BS is not None
            before_B1 = torch.tensor(self.lengths, device=tokens_BT.device)[:, None]
            self._mask_BS = torch.cat([self._mask_BS, new_BT.long()], dim=1)
            positions = {
                "attention_mask": self._mask_BS,
                "position_ids": (before_B1 + new_BT.long().cumsum(1) - 1).clamp(min=0),
            }
        if prompt:
            added = added if new_BT is None else new_BT.sum(1).tolist()
        options = last_logits(self.model, tokens_BT) if prompt else {}
        out = self.model(
            input_ids=tokens_BT, use_cache=True, **with_cache(self.model, self.cache), **positions, **options
        )
        self.lengths = [length + more for length, more in zip(self.lengths, added, strict=True)]
        self._undecided += tokens_BT.shape[1]
        logits: Tensor = out.logits
        return logits

    def keep(self, counts: Sequence[int]) -> None:
        """Keep the first `counts[b]` of row b's tokens since the last call; equal counts unless `by_row`."""
        undecided, self._undecided = self._undecided, 0
        self.lengths = [length - undecided + count for length, count in zip(self.lengths, counts, strict=True)]
        if min(counts) == max(counts):
            self.cache.crop(counts[0] - undecided)
            if self._mask_BS is not None:
                self._mask_BS = self._mask_BS[:, : self._mask_BS.shape[1] - undecided + counts[0]]
        else:
            self._keep_by_row(counts, undecided)
        if self.by_row and self._mask_BS is not None:
            self._compact()

    def _keep_by_row(self, counts: Sequence[int], undecided: int) -> None:
        """Mask out, as dead, the columns that one row does not keep and another one does."""
        if self._mask_BS is None:
            columns = self.cache.get_seq_length()
            self._mask_BS = torch.ones(len(counts), columns, dtype=torch.long, device=self.model.device)
        kept_BN = accept_rows(self.cache, counts, undecided).to(self._mask_BS)
        self._mask_BS = torch.cat([self._mask_BS[:, : self._mask_BS.shape[1] - undecided], kept_BN], dim=1)

    def select(self, rows: Sequence[int]) -> None:
        """Only these rows go on; to be called before `keep`."""
        if len(rows) == len(self.lengths):
            return
        index = torch.tensor(rows, device=self.model.device)
        self.cache.batch_select_indices(index)
        self.lengths = [self.lengths[row] for row in rows]
        if self._mask_BS is not None:
            self._mask_BS = self._mask_BS[index]

    def _compact(self) -> None:
        """Remove columns that no row needs from the cache once there are more than `MAX_DEAD_COLUMNS`."""
        assert self._mask_BS is not None
        if self._mask_BS.shape[1] - max(self.lengths) <= MAX_DEAD_COLUMNS:
            return
        self._mask_BS = compact(self.cache, self._mask_BS)
        if bool(self._mask_BS.all()):
            self._mask_BS = None


def check_rollback(model: PreTrainedModel, role: str) -> None:
    """Raise InputError for a model that cannot roll back."""
    if keeps_recurrent_state(model):
        raise InputError(
            f"the {role} ({type(model).__name__}) keeps a recurrent state that cannot roll back: convert it with "
            "linearize, or decode without speculation"
        )
    cache = DynamicCache(config=model.config)
    check_layers(cache, role)


def check_layers(cache: Any, role: str) -> None:
    """Raise InputError, naming the layer, where one of the cache cannot roll back."""
    for index, layer in enumerate(cache.layers):
        if not getattr(layer, "is_croppable", False):
            raise InputError(
                f"layer {index} of the {role}'s cache ({type(layer).__name__}) cannot roll back: decode without "
                "speculation, or take a model whose layers are softmax attention or mixers of linearize"
            )


def _keeps_by_row(layer: object) -> bool:
    whole = isinstance(layer, DynamicLayer) and not isinstance(layer, DynamicSlidingWindowLayer)
    return whole or (isinstance(layer, MixerCacheLayer) and hasattr(layer, "accept"))
