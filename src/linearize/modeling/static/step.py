"""One step of decoding, or of verifying a draft, in fixed shapes and memory, so that a GPU can replay it as a graph.

A step reads T tokens in each row and gives the logits after each. With `rollback` the last tokens read wait in a tail
until a later step is told how many of them each row keeps: that step takes those into the states and reads its own
tokens in one call. How many stay is a tensor; no step allocates, branches or waits by it.

Letters: B batch, T new tokens of a step, P columns of the tail, S prompt, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize.errors import InputError
from linearize.modeling.attention import MixerCall
from linearize.modeling.cache_argument import cache_argument, with_cache
from linearize.modeling.forward_call import last_logits
from linearize.modeling.static.cache import Place, StepCache
from linearize.modeling.static.graphs import Graphs, Recorder, recorder_for
from linearize.modeling.static.layers import attending_static, softmax_configs, static_layers
from linearize.modeling.student import LinearizedForCausalLM
from linearize.ops.dispatch import MAX_MULTI_TOKEN
from linearize.ops.layout import Layout

Forward = Callable[[PreTrainedModel, Tensor, Tensor, bool], Tensor]


class StaticStep:
    """A model with a static cache for `batch` rows.

    `model` is held weakly. `lengths` is an upper bound of each row's tokens (exact where `kept` was given as numbers).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        batch: int,
        width: int = 1,
        capacity: int | None = None,
        rollback: bool = True,
        record: Recorder | None = None,
    ) -> None:
        """`width`: the most tokens that wait for a decision (with `rollback`), and of a step.

        `capacity`: the most tokens of a row; needed where softmax layers hold the whole text, and only there.
        `rollback`: off, every token goes into the states at once. `record`: how a step is made a graph (None: as CUDA
        graphs on a CUDA device, not at all elsewhere).

        Raises:
            InputError: sizes out of range, or a model that cannot run so; says why.
        """
        if batch < 1 or not 1 <= width <= MAX_MULTI_TOKEN:
            raise InputError(
                f"static step of {batch} rows, {width} tokens: give at least 1 row, 1 to {MAX_MULTI_TOKEN} tokens"
            )
        if any(parameter.is_meta for parameter in model.parameters()):
            raise InputError(
                "static step of a model whose weights are offloaded: its memory must not move; load it without offload"
            )
        self.batch, self.width, self.capacity, self.rollback = batch, width, capacity, rollback
        self.cache = StepCache(layers=static_layers(model, width if rollback else 0, capacity, width))
        self.rows = batch  # rows that steps read: the first so many
        self.lengths: list[int] = []
        self.held = 0  # tokens of each row that wait for a decision
        self._exact = True
        self._cache_argument = cache_argument(model.lm if isinstance(model, LinearizedForCausalLM) else model)
        self._model, self._configs = weakref.ref(model), softmax_configs(model)
        with torch.inference_mode(False):
            self.start_B, self.kept_B, self.held_1 = (
                torch.zeros(size, dtype=torch.long, device=model.device) for size in (batch, batch, 1)
            )  # position of the first token that no state holds; what rows keep; how many tokens wait
        self._forward: Forward = self.forward
        self._graphs = Graphs(recorder_for(model.device) if record is None else record)

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        model = self._model()
        assert model is not None, "the model of this step is gone"
        return model

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read the prompts, `[B, S]` behind padding on the left; gives the logits after them, `[B, 1, V]`.

        Raises:
            InputError: another number of rows, or prompts beyond the capacity.
        """
        rows, tokens = input_ids.shape
        if rows != self.batch:
            raise InputError(f"{rows} prompts were given to a static step of {self.batch} rows: make one of that many")
        self.lengths = [tokens] * rows if attention_mask is None else attention_mask.sum(1).tolist()
        self.held, self._exact, self.rows = 0, True, self.batch
        self._check_capacity(0)
        self.cache.begin(self.lengths)
        options = last_logits(self.model, input_ids)
        if min(self.lengths) < tokens and attention_mask is not None:
            positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
            options |= {"attention_mask": attention_mask, "position_ids": positions}
        out = self.model(input_ids=input_ids, use_cache=True, **with_cache(self.model, self.cache), **options)
        self.start_B.copy_(torch.tensor(self.lengths))
        self.held_1.zero_()
        logits: Tensor = out.logits[:, -1:]
        return logits

    @torch.no_grad()
    def step(self, tokens_BT: Tensor, kept: Sequence[int] | Tensor | None = None) -> Tensor:
        """Read the next tokens; gives the logits after each, `[B, T, V]`, which the next step may overwrite.

        `kept`: row b keeps its first `kept[b]` tokens of those that wait, the rest never were (None: not decided yet).
        A tensor is taken as it is, without a look at its values. Without `rollback` there is nothing to decide.

        Raises:
            InputError: before `prefill`, more tokens than the width, counts out of range, or a full cache.
        """
        tokens = tokens_BT.shape[1]
        commit = not self.rollback or kept is not None
        self._check(tokens_BT, kept)
        self._count(kept, tokens)
        if isinstance(kept, Tensor):
            self.kept_B.copy_(kept)
        elif kept is not None:
            self.kept_B.copy_(torch.tensor(kept))
        with attending_static(self._configs):
            return self._graphs.run((self.rows, tokens, commit), tokens_BT, self._steps(commit), self._moving)

    def _steps(self, commit: bool) -> Callable[[Tensor], Tensor]:
        return lambda tokens_BT: self._forward(self.model, tokens_BT, self.kept_B, commit)

    def forward(self, model: PreTrainedModel, tokens_BT: Tensor, kept_B: Tensor, commit: bool) -> Tensor:
        """A step as tensors alone: what is captured. `commit`: the tail is decided on by `kept_B`; kept softmax layers
        must be routed (`step` does it)."""
        (rows, tokens), device = tokens_BT.shape, tokens_BT.device
        new_T = torch.arange(tokens, device=device)
        start_B1 = self.start_B[:rows, None]
        tail = self.width if self.rollback else 0
        count_B1 = (kept_B[:, None] if commit else self.held_1[None]) if tail else torch.zeros_like(start_B1)
        slot_P = torch.arange(tail, device=device)
        tail_BP = torch.where(slot_P < count_B1, start_B1 + slot_P, -1)
        position_BT = start_B1 + count_B1 + new_T
        layout = Layout(position_BT=torch.cat([tail_BP, position_BT], dim=1), tail=tail)
        place = Place(commit, new_T if commit else self.held_1 + new_T)
        call = MixerCall(layout, self.cache, place=place)
        lm: Any = model.lm if isinstance(model, LinearizedForCausalLM) else model
        out = lm(
            input_ids=tokens_BT,
            position_ids=position_BT,
            use_cache=True,
            mixer_call=call,
            **{self._cache_argument: self.cache},
        )
        if commit:
            self.start_B[:rows].add_(kept_B if tail else tokens)
            self.held_1.fill_(tokens)
        else:
            self.held_1.add_(tokens)
        logits: Tensor = out.logits
        return logits

    def compile(self, **options: Any) -> None:
        """Run steps through `torch.compile(fullgraph=True)` with these options; one graph for each T."""
        self._forward = torch.compile(self.forward, fullgraph=True, dynamic=False, **options)
        self._graphs.clear()

    def grow(self, *, width: int | None = None, capacity: int | None = None) -> None:
        """A wider tail or more room; what was read stays, recorded graphs are dropped.

        Raises:
            InputError: a width out of range.
        """
        if width is not None and width > self.width:
            if width > MAX_MULTI_TOKEN:
                raise InputError(
                    f"{width} tokens wait for a decision, a static step holds {MAX_MULTI_TOKEN}: draft fewer tokens"
                )
            self.width = width
            for mixer_layer in self.cache.mixer_layers:
                mixer_layer.widen(width)
        if capacity is not None and self.capacity is not None and capacity > self.capacity:
            self.capacity = capacity
            for layer in self.cache.whole_layers:
                layer.lengthen(capacity)
        self._graphs.clear()

    def _check(self, tokens_BT: Tensor, kept: Sequence[int] | Tensor | None) -> None:
        rows, tokens = tokens_BT.shape
        waiting = 0 if kept is not None else self.held
        if not self.lengths or rows != self.rows:
            raise InputError(
                f"a step of {rows} rows: read {self.rows} prompts with prefill first, then go on with them"
            )
        if kept is not None and not self.rollback:
            raise InputError("a static step without rollback keeps every token: leave `kept` out")
        if not 1 <= tokens <= self.width - (waiting if self.rollback else 0):
            raise InputError(
                f"a step of {tokens} tokens while {waiting} wait for a decision: together 1 to {self.width}, the width"
            )
        if kept is None or isinstance(kept, Tensor):
            return
        if len(kept) != rows or not all(0 <= count <= self.held for count in kept):
            raise InputError(f"kept {list(kept)}: give {rows} counts, each from 0 to the {self.held} tokens that wait")

    def _count(self, kept: Sequence[int] | Tensor | None, tokens: int) -> None:
        """Lengths and tokens that wait, as far as they are known without asking the device; refuses a full cache."""
        before = self.lengths, self.held, self._exact
        if not self.rollback:
            self.lengths = [length + tokens for length in self.lengths]
        elif kept is None:
            self.held += tokens
        else:
            more = [self.held] * self.batch if isinstance(kept, Tensor) else kept
            self.lengths = [length + count for length, count in zip(self.lengths, more, strict=True)]
            self._exact = self._exact and not isinstance(kept, Tensor)
            self.held = tokens
        try:
            self._check_capacity(0 if not self.rollback else self.held)
        except InputError:
            if self._exact:
                self.lengths, self.held, self._exact = before
                raise
            decided = self.start_B if kept is None else self.start_B + torch.as_tensor(kept, device=self.start_B.device)
            self.lengths, self._exact = decided.tolist(), True  # the only look at the device, where room runs out
            self._check_capacity(self.held)

    def _check_capacity(self, more: int) -> None:
        if self.capacity is None or not self.cache.whole_layers:
            return
        needed = max(self.lengths) + more
        if needed > self.capacity:
            raise InputError(f"{needed} tokens do not fit into a static cache of {self.capacity}: give more capacity")

    def _moving(self) -> list[Tensor]:
        """Memory that a step reads before it writes it."""
        kept = [buffer for layer in self.cache.layers for buffer in layer.buffers()]
        return [self.start_B, self.held_1, *kept]
