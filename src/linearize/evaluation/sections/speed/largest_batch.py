"""How many rows a model can decode at once in a given memory, and how fast it is there.

Rows are prefilled one at a time, as servers do, and decode together: memory is their caches and a step's activations.

Letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize.errors import one_line
from linearize.evaluation.sections.speed.numbers import Rows, TimedRows, decode_speed
from linearize.evaluation.speed.equality import row_difference
from linearize.evaluation.speed.memory import peak_bytes
from linearize.evaluation.speed.running import (
    DecodeRun,
    RunConfig,
    attending,
    decode,
    feed,
    measuring,
    new_cache,
    prefill,
    random_text,
    repeated,
    time_decode,
)

TOKENS, REPEATS = 4, 3  # of the timed decode
PROBES = (2, 10)  # batches whose memory is measured on a CPU


class RepeatedRow:
    """A model with the cache of one row of text, which decodes several times over: what that takes and how fast it is.

    `after_1T`: the tokens that the row reads next.
    """

    def __init__(self, model: PreTrainedModel, config: RunConfig, cache: Any, after_1T: Tensor) -> None:
        self.model, self.config, self.cache, self.after_1T = model, config, cache, after_1T

    def filled(self, rows: int) -> Any:
        """Return a cache of so many equal rows, in memory of its own."""
        return repeated(self.cache, rows)

    def tokens(self, rows: int) -> Tensor:
        """Return what they read next, `[rows, T]`."""
        return self.after_1T.expand(rows, -1)

    def peak(self, rows: int) -> int:
        """Return the most bytes taken while `rows` rows read two tokens."""
        return peak_bytes(self.model.device, lambda: decode(self.model, self.filled(rows), self.tokens(rows)[:, :2]))

    def fits(self, rows: int, budget: int) -> bool:
        """Whether `peak` stays within a budget; running out of memory is one way of not doing so."""
        try:
            return self.peak(rows) <= budget
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return False

    def most(self, budget: int, most: int) -> int:
        """Return the most rows that fit, up to `most`: searched for on a GPU; on a CPU from a straight line through two
        measured batches, and searched for below where the run at the result takes more."""
        if self.model.device.type == "cuda":
            return search(lambda size: self.fits(size, budget), most)
        few, many = PROBES
        at_few = self.peak(few)
        slope = max((self.peak(many) - at_few) / (many - few), 1.0)
        batch = min(most, max(0, few + math.floor((budget - at_few) / slope)))
        if batch == 0 or self.fits(batch, budget):
            return batch
        return search(lambda size: self.fits(size, budget), batch - 1)

    def after_one(self, rows: int) -> tuple[Any, str]:
        """Return the cache of `rows` rows once they have read a token; and a reason, where their logits are not those
        of one row alone."""
        one_1V, _ = feed(self.model, self.filled(1), self.after_1T[:, :1])
        many_BV, cache = feed(self.model, self.filled(rows), self.tokens(rows)[:, :1])
        difference, allowed = row_difference(one_1V, many_BV)
        if difference <= allowed:
            return cache, ""
        return cache, f"wrong output: {rows} equal rows differ from one by {difference:.3g} in the logits"


def read_row(model: PreTrainedModel, config: RunConfig, *, context: int, chunk: int, seed: int) -> RepeatedRow:
    """Let the model read one row of random text."""
    ids_1T = random_text([model], 1, context + TOKENS + 1, seed)
    _, cache = prefill(model, new_cache(config, model, context + TOKENS + 1), ids_1T[:, :context], chunk)
    return RepeatedRow(model, config, cache, ids_1T[:, context:])


def largest_batch(
    model: PreTrainedModel, config: RunConfig, *, context: int, budget: int, most: int, chunk: int, seed: int
) -> TimedRows | Rows:
    """Return the largest batch (0: not one row fits; at most `most`), its peak of memory, and the speed of decode."""
    with measuring([model]), attending(model, config.attention):
        try:
            row = read_row(model, config, context=context, chunk=chunk, seed=seed)
            batch = row.most(budget, most)
            facts: dict[str, Any] = {
                "batch": batch, "capped": batch == most, "cache": config.cache, "attention": config.attention,
                "peak_bytes": row.peak(batch or 1),
            }  # fmt: skip
            reason = row.after_one(batch)[1] if batch else "one row does not fit"
            if reason:
                return Rows(**facts, reason=reason)
            run = DecodeRun(model=model, config=config, filled=lambda: row.filled(batch))
            timing = time_decode({"decode": run}, row.tokens(batch)[:, :TOKENS], REPEATS)["decode"]
            return TimedRows(**facts, reason="", **decode_speed(timing, batch, TOKENS).to_json())
        except (RuntimeError, IndexError, ValueError) as error:
            return Rows(batch=0, reason=f"does not run: {one_line(error)}")


def peak_of_rows(model: PreTrainedModel, config: RunConfig, *, rows: int, context: int, chunk: int, seed: int) -> int:
    """Return the most bytes taken while `rows` rows decode, caches and activations."""
    with measuring([model]), attending(model, config.attention):
        return read_row(model, config, context=context, chunk=chunk, seed=seed).peak(rows)


def search(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest size, up to `most`, that fits: doubling, then bisection; 0 where not even 1 does."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
