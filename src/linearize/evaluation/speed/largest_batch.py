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
from linearize.evaluation.speed.equality import row_difference
from linearize.evaluation.speed.memory import peak_bytes
from linearize.evaluation.speed.reading import decode, feed, measuring, prefill, random_text, repeated
from linearize.evaluation.speed.run_config import RunConfig, attending, new_cache
from linearize.evaluation.speed.timing import interleaved

TOKENS = 4
REPEATS = 3
LAST = 2 + TOKENS * (1 + REPEATS)
PROBES = (2, 10)


class Held:
    """A model with the cache of one row of text, which decodes several times over; says what that takes.

    `after_1T`: the tokens that the row reads next.
    """

    def __init__(self, model: PreTrainedModel, cache: Any, after_1T: Tensor) -> None:
        self.model, self.cache, self.after_1T = model, cache, after_1T

    def held(self, rows: int) -> Any:
        """A cache of so many equal rows, in memory of its own."""
        return repeated(self.cache, rows)

    def tokens(self, rows: int) -> Tensor:
        """What they read next."""
        return self.after_1T.expand(rows, -1)

    def peak(self, rows: int) -> int:
        """The most bytes held while `rows` rows read two tokens."""
        return peak_bytes(self.model.device, lambda: decode(self.model, self.held(rows), self.tokens(rows)[:, :2]))

    def fits(self, rows: int, budget: int) -> bool:
        """Whether `peak` stays within a budget; running out of memory is one way of not doing so."""
        try:
            return self.peak(rows) <= budget
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return False

    def most(self, budget: int, most: int) -> int:
        """The most rows that fit, up to `most`: tried on a GPU; on a CPU computed from two sizes and then tried."""
        if self.model.device.type == "cuda":
            return search(lambda size: self.fits(size, budget), most)
        return _computed(self, budget, most)

    def after_one(self, rows: int) -> tuple[Any, str]:
        """The cache of `rows` rows once they have read a token; the reason, where their logits are not those of one row
        alone."""
        one_1V, _ = feed(self.model, self.held(1), self.after_1T[:, :1])
        many_BV, cache = feed(self.model, self.held(rows), self.tokens(rows)[:, :1])
        difference, allowed = row_difference(one_1V, many_BV)
        if difference <= allowed:
            return cache, ""
        return cache, f"wrong output: {rows} equal rows differ from one by {difference:.3g} in the logits"


class Rows(Held):
    """A model that has read one row of random text, by prefill."""

    def __init__(self, model: PreTrainedModel, config: RunConfig, *, context: int, chunk: int, seed: int) -> None:
        ids_1T = random_text([model], 1, context + LAST, seed)
        _, cache = prefill(model, new_cache(config, model, context + LAST), ids_1T[:, :context], chunk)
        super().__init__(model, cache, ids_1T[:, context:])

    def speed(self, rows: int) -> dict[str, Any]:
        """Tokens per second of all rows together; the reason, where their outputs are not those of one row alone."""
        held, reason = self.after_one(rows)
        if reason:
            return {"reason": reason}
        pieces = iter(self.tokens(rows)[:, 1:].split(TOKENS, dim=1))

        def run() -> None:
            nonlocal held
            held = decode(self.model, held, next(pieces))

        timing = interleaved({"decode": run}, REPEATS)["decode"]
        ms = 1000 / TOKENS
        return {
            "decode_tokens_per_second": rows * TOKENS / timing.seconds,
            "ms_per_token": timing.seconds * ms,
            "ms_spread": [timing.lowest * ms, timing.highest * ms],
            "reason": "",
        }


def largest_batch(
    model: PreTrainedModel, config: RunConfig, *, context: int, budget: int, most: int, chunk: int, seed: int
) -> dict[str, Any]:
    """`batch` (0: not one row fits; at most `most`), `peak_bytes` there, and the speed of decode there.

    Measured on a GPU; on the CPU computed from two measured sizes, and verified by a run at the result.
    """
    with measuring([model]), attending(model, config.attention):
        try:
            rows = Rows(model, config, context=context, chunk=chunk, seed=seed)
            batch = rows.most(budget, most)
            told = {"batch": batch, "capped": batch == most, "cache": config.cache, "attention": config.attention}
            if batch == 0:
                return told | {"peak_bytes": rows.peak(1), "reason": "one row does not fit"}
            return told | {"peak_bytes": rows.peak(batch), **rows.speed(batch)}
        except (RuntimeError, IndexError, ValueError) as error:
            return {"batch": 0, "reason": f"does not run: {one_line(error)}"}


def peak_of_rows(model: PreTrainedModel, config: RunConfig, *, rows: int, context: int, chunk: int, seed: int) -> int:
    """The most bytes held while `rows` rows decode, caches and activations."""
    with measuring([model]), attending(model, config.attention):
        return Rows(model, config, context=context, chunk=chunk, seed=seed).peak(rows)


def search(fits: Callable[[int], bool], most: int) -> int:
    """The largest size, up to `most`, that fits: doubling, then bisection; 0 where not even 1 does."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _computed(rows: Held, budget: int, most: int) -> int:
    """From a straight line through two measured sizes; searched below where the run at the result takes more."""
    few, many = PROBES
    at_few = rows.peak(few)
    slope = max((rows.peak(many) - at_few) / (many - few), 1.0)
    batch = min(most, max(0, few + math.floor((budget - at_few) / slope)))
    return batch if batch == 0 or rows.fits(batch, budget) else search(lambda size: rows.fits(size, budget), batch - 1)
