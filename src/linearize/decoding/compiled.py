"""Plain decoding by a static step under `torch.compile`, with transformers' `generate` around it: for long runs, since
compiling takes longer than most texts.

Letters: B batch, S prompt, T tokens of text so far.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer

from linearize.errors import InputError, one_line, unknown
from linearize.modeling.static.graphs import weights_at
from linearize.modeling.static.step import StaticStep

ROOM = 256  # room of softmax layers over the whole text is a multiple of this, so that one step serves many texts


@dataclass(frozen=True, eq=False)
class _Ready:
    """A compiled step, and what it was compiled for."""

    step: StaticStep
    backend: str
    weights: int

    def serves(self, rows: int, tokens: int, backend: str, weights: int) -> bool:
        fits = not self.step.cache.whole_layers or (self.step.capacity or 0) >= tokens
        return fits and (self.step.batch, self.backend, self.weights) == (rows, backend, weights)


_READY: weakref.WeakKeyDictionary[PreTrainedModel, _Ready] = weakref.WeakKeyDictionary()


def compiled_step(model: PreTrainedModel, *, rows: int, tokens: int, backend: str = "inductor") -> StaticStep | None:
    """A step that reads one token in each of `rows` texts of at most `tokens`, compiled here and now; the last one of a
    model is kept as long as the model lives. On a GPU its kernels are recorded as a CUDA graph.

    None, after one warning, where the model has no static form or cannot be compiled (no compiler, a graph break).

    Raises:
        InputError: an unknown backend, or a generation config that asks for more than one greedy or sampled text.
    """
    _check(model, backend)
    weights = weights_at(model)
    ready = _READY.get(model)
    if ready is not None and ready.serves(rows, tokens, backend, weights):
        return ready.step
    print("compiling a step of decoding, which takes half a minute or more", file=sys.stderr)
    try:
        step = StaticStep(model, batch=rows, capacity=-(-tokens // ROOM) * ROOM, rollback=False)
        step.compile(backend=backend)
        with torch.inference_mode():  # as later: the mode is part of what is compiled
            any_token_B1 = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
            step.prefill(any_token_B1)
            step.step(any_token_B1)
    except (RuntimeError, InputError, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
        why = one_line(getattr(error, "inner_exception", error))  # a backend's own error comes wrapped
        warnings.warn(f"decoding goes on without torch.compile: {why}", stacklevel=2)
        return None
    _READY[model] = _Ready(step, backend, weights)
    return step


def _check(model: PreTrainedModel, backend: str) -> None:
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise unknown("backend of torch.compile", backend, known)
    config: Any = model.generation_config
    mode, texts = config.get_generation_mode(), config.num_return_sequences or 1
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or texts > 1:
        request = f"{texts} texts of a prompt" if texts > 1 else mode.value.replace("_", " ")
        raise InputError(f"the generation config asks for {request}: change it, or decode without compile")


class StepLoop:
    """The loop of `generate(custom_generate=StepLoop(step))`: tokens chosen as transformers chooses them.

    `streamer` comes in here: transformers hands none to a loop that is not its own.
    """

    def __init__(self, step: StaticStep, streamer: BaseStreamer | None = None) -> None:
        self.step, self.streamer = step, streamer

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **inputs: Any,
    ) -> Tensor:
        """Prompts `[B, S]` and their continuations, `[B, T]`; rows that have ended go on with padding.

        Of `inputs`, what transformers' own loop hands on to the model, only the mask is needed.
        """
        text_BT: Any = input_ids  # transformers' types ask for a LongTensor
        going_B = torch.ones_like(input_ids[:, 0], dtype=torch.bool)
        self._show(input_ids)
        logits_B1V = self.step.prefill(input_ids, inputs.get("attention_mask"))
        while True:
            scores_BV = logits_processor(text_BT, logits_B1V[:, -1].to(torch.float32, copy=True))
            if generation_config.do_sample:
                token_B = torch.multinomial(scores_BV.softmax(-1), 1)[:, 0]
            else:
                token_B = scores_BV.argmax(-1)
            token_B = torch.where(going_B, token_B, generation_config.pad_token_id or 0)
            self._show(token_B)
            text_BT = torch.cat([text_BT, token_B[:, None]], dim=1)
            going_B = going_B & ~stopping_criteria(text_BT, None)
            if not going_B.any():
                break
            logits_B1V = self.step.step(token_B[:, None])
        if self.streamer is not None:
            self.streamer.end()
        return text_BT

    def _show(self, tokens: Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
