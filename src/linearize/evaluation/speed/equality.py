"""Checks what is timed: logits through a cache against those of a plain forward over the text, at a small length.

Letters: B rows, T tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize.errors import one_line
from linearize.evaluation.numbers import NumbersModel
from linearize.evaluation.speed.running import RunConfig, attending, feed, new_cache
from linearize.modeling import LinearizedForCausalLM

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
NEW_TOKENS = 6  # decoded by the check


class Check(NumbersModel):
    """One configuration of a model, compared. `difference`: the largest one of logits (None: not finite), `allowed`:
    what rounding may make of it; `way`: the configuration; `error`: why it does not run at all, else empty."""

    model: str
    way: str
    batch: int
    tokens: int
    difference: float | None
    allowed: float
    equal: bool
    error: str

    @property
    def reason(self) -> str:
        """Why no speed is reported, empty when all is right."""
        if self.error or self.equal:
            return self.error
        apart = "without limit" if self.difference is None else f"by {self.difference:.3g}"
        return f"wrong output: logits differ from a plain forward {apart}, allowed {self.allowed:.2g}"


@dataclass(frozen=True)
class Reference:
    """Greedy tokens and their logits from plain forwards; `plain_BT` is the text they continue."""

    plain_BT: Tensor
    new_BN: Tensor
    logits_BNV: Tensor


def reference(model: Any, ids_BT: Tensor, new_tokens: int) -> Reference:
    """Continue greedily, each token from a forward over all of the text without a cache; softmax attention is eager."""
    text_BT, logits = ids_BT, []
    with attending(model, "eager"):
        for _ in range(new_tokens):
            logits.append(model(input_ids=text_BT, use_cache=False).logits[:, -1])
            text_BT = torch.cat([text_BT, logits[-1].argmax(dim=-1, keepdim=True)], dim=1)
    return Reference(ids_BT, text_BT[:, ids_BT.shape[1] :], torch.stack(logits, dim=1))


def check_config(name: str, model: PreTrainedModel, config: RunConfig, expected: Reference) -> Check:
    """Feed the same text and tokens through the configuration's cache, with the text at once, and in unequal chunks.

    Tokens are equal when at each step the greedy one is the reference's, or as likely there but for rounding.
    """
    batch, length = expected.plain_BT.shape
    allowed = TOLERANCE[model.dtype] * float(expected.logits_BNV.float().std())
    error, largest = "", math.inf
    try:
        with attending(model, config.attention):
            largest = max(_difference(model, config, expected, split) for split in ([length], _chunks(length)))
    except Exception as failure:  # a configuration that transformers cannot run with this model is an answer
        error = f"does not run: {one_line(failure)}"
    return Check(
        model=name, way=str(config), batch=batch, tokens=length, allowed=allowed, equal=largest <= allowed,
        difference=largest if math.isfinite(largest) else None, error=error,
    )  # fmt: skip


def _difference(model: PreTrainedModel, config: RunConfig, expected: Reference, split: list[int]) -> float:
    """Return the largest difference of logits, or how much less likely a greedy token is that differs; inf for NaN."""
    cache = new_cache(config, model, expected.plain_BT.shape[1] + expected.new_BN.shape[1])
    logits_BV = expected.logits_BNV[:, 0]
    for chunk_BT in expected.plain_BT.split(split, dim=1):
        logits_BV, cache = feed(model, cache, chunk_BT)
    largest = torch.zeros((), device=logits_BV.device)
    for step in range(expected.new_BN.shape[1]):
        right_BV = expected.logits_BNV[:, step].float()
        chosen_B1 = logits_BV.argmax(dim=-1, keepdim=True)
        less_likely = right_BV.amax(dim=-1, keepdim=True) - right_BV.gather(1, chosen_B1)
        largest = torch.stack([largest, (logits_BV.float() - right_BV).abs().max(), less_likely.max()]).max()
        if step + 1 < expected.new_BN.shape[1]:
            logits_BV, cache = feed(model, cache, expected.new_BN[:, step, None])
    return float(largest.nan_to_num(math.inf, math.inf))


def row_difference(one_1V: Tensor, rows_BV: Tensor) -> tuple[float, float]:
    """Return the largest difference between the logits of one row and of that row repeated; and what is allowed."""
    difference = float((rows_BV.float() - one_1V.float()).abs().max())
    return difference, TOLERANCE[one_1V.dtype] * float(one_1V.float().std())


def _chunks(length: int) -> list[int]:
    """Unequal chunks of a text, the last one a single token."""
    first = -(-length * 2 // 5)
    second = max(length - first - 1, 0)
    return [size for size in (first, second, length - first - second) if size]


def length_needed(model: Any, tokens: int) -> int:
    """Tokens of the check: `tokens`, or more than twice a student's window, so that its linear branch takes part."""
    if not isinstance(model, LinearizedForCausalLM):
        return tokens
    windows = [int(entry.get("window") or 0) for entry in model.config.plan if entry is not None]
    return max(tokens, 2 * max(windows, default=0) + 3)


def check_model(
    name: str, model: PreTrainedModel, configs: Sequence[RunConfig], ids_BT: Tensor, new_tokens: int = NEW_TOKENS
) -> list[Check]:
    """Check each configuration on this text; where no plain forward runs over it, each says why."""
    try:
        expected = reference(model, ids_BT, new_tokens)
    except (RuntimeError, IndexError, ValueError) as failure:  # positions beyond a model's table, or out of memory
        error = f"no plain forward over {ids_BT.shape[1]:,} tokens: {one_line(failure)}"
        batch, tokens = ids_BT.shape
        return [
            Check(
                model=name, way=str(config), batch=batch, tokens=tokens, difference=None, allowed=0.0, equal=False,
                error=error,
            )
            for config in configs
        ]  # fmt: skip
    return [check_config(name, model, config, expected) for config in configs]
