"""Tokens per second while many rows write long texts together, at the largest batch that a memory holds.

Weights, caches and a step's activations share the memory. What a step costs is measured at several fills of the caches
and added up over the whole text. All models are run by the same rules, softmax models in each of their ways.

Letters: B rows, T tokens.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from linearize.errors import InputError, one_line
from linearize.evaluation.sections.speed.largest_batch import RepeatedRow
from linearize.evaluation.speed.equality import check_config, length_needed, reference
from linearize.evaluation.speed.memory import weight_bytes
from linearize.evaluation.speed.running import (
    CacheKind,
    RunConfig,
    attending,
    decode,
    measuring,
    new_cache,
    now,
    prefill,
    random_text,
    run_configs,
)

CHECKED = (3, 7, 3)  # rows, tokens and new tokens of the check against a plain forward
PRUNED_BEYOND = 3.0  # times as slow as another way at the end of the text: then not measured at other fills
CACHES: tuple[CacheKind, ...] = ("static", "dynamic")
ATTENTIONS = ("sdpa", "eager")


@dataclass(frozen=True, kw_only=True)
class GenerationWorkload:
    """What is written: `generated` tokens in each row, in a memory of `budget` bytes (weights included), by at most
    `most` rows.

    `fills`: tokens in the caches where steps are timed, `span` of them each. Each fill is moved on by `span` tokens
    more than the one before, so that all parts of a window's block are met. `chunk`: tokens of one chunk of prefill.
    """

    generated: int = 4096
    fills: tuple[int, ...] = (256, 1024, 2048, 3072, 4096)
    span: int = 16
    budget: int = 2 * 10**9
    most: int = 1024
    chunk: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("generated", "span", "budget", "most", "chunk"):
            if getattr(self, name) < 1:
                raise InputError(f"throughput: {name} is {getattr(self, name)}: it must be at least 1")
        if not self.fills or min(self.fills) < 1:
            raise InputError(f"throughput: fills {list(self.fills)}: give at least one, each at least 1")
        if self.generated < self.span + 3:
            raise InputError(f"throughput: {self.generated} tokens, {self.span} of them timed: write more tokens")

    @property
    def stops(self) -> list[int]:
        """The fills as measured, ascending."""
        last = self.generated - self.span - 2
        moved = (fill + index * self.span for index, fill in enumerate(sorted(self.fills)))
        return sorted({min(stop, last) for stop in moved})


class Filled(RepeatedRow):
    """A row at some fill, in one configuration; its keys and values were read with a growing cache or its own."""

    def __init__(self, model: PreTrainedModel, config: RunConfig, cache: Any, after_1T: Tensor, cache_len: int) -> None:
        super().__init__(model, config, cache, after_1T)
        self.cache_len = cache_len
        self._peaks: dict[int, int] = {}

    def peak(self, rows: int) -> int:
        """See `RepeatedRow`; measured once."""
        if rows not in self._peaks:
            self._peaks[rows] = super().peak(rows)
        return self._peaks[rows]

    def filled(self, rows: int) -> Any:
        """See `RepeatedRow`; a preallocated cache has room for the whole text."""
        if self.config.cache != "static":
            return super().filled(rows)
        static: Any = StaticCache(config=self.model.config, max_cache_len=self.cache_len)
        for layer, full in zip(static.layers, self.cache.layers, strict=True):
            layer.update(full.keys.expand(rows, -1, -1, -1), full.values.expand(rows, -1, -1, -1))
        return static

    def step_seconds(self, rows: int, span: int) -> dict[str, Any]:
        """Seconds of one step, of the wall clock and of the processor: the mean over `span` steps."""
        cache, reason = self.after_one(rows)
        if reason:
            return {"reason": reason}
        ids_BT = self.tokens(rows)[:, 1 : 1 + span]
        began, began_cpu = now(), time.process_time()
        decode(self.model, cache, ids_BT)
        wall, cpu = now() - began, time.process_time() - began_cpu
        return {"seconds": wall / span, "cpu_seconds": cpu / span, "reason": ""}


def throughput(model: PreTrainedModel, workload: GenerationWorkload, *, name: str = "model") -> dict[str, Any]:
    """The model in its best way: `tokens_per_second` (and `_cpu`), `batch`, `peak_bytes` with weights, `way`, `steps`
    (seconds at each fill), and under `ways` what each way gave. `reason` says why there is no speed."""
    with measuring([model]):
        text_1T = random_text([model], 1, workload.generated + 2, workload.seed)
        filled = _fill(model, text_1T, [*workload.stops, workload.generated - 2], workload.chunk)
        runs = [
            _Run(model, config, filled, text_1T, workload, name) for config in run_configs(model, CACHES, ATTENTIONS)
        ]
        fastest = min(run.row_seconds for run in runs)
        tried = {str(run.config): run.whole(fastest) for run in runs}
    best = max(tried.values(), key=lambda result: float(result.get("tokens_per_second", 0.0)))
    return {"model": name, "weight_bytes": weight_bytes(model), **best, "ways": tried}


def _fill(model: PreTrainedModel, text_1T: Tensor, stops: Sequence[int], chunk: int) -> dict[int, Any]:
    """Caches of one row at these fills."""
    config = run_configs(model, ("dynamic",), ("sdpa",))[0]
    caches, at = {}, 0
    with attending(model, config.attention):
        cache = new_cache(config, model, text_1T.shape[1])
        for stop in stops:
            _, cache = prefill(model, cache, text_1T[:, at:stop], chunk)
            caches[stop], at = copy.deepcopy(cache), stop
    return caches


class _Run:
    """One way: checked against a plain forward, its largest batch, and its steps there, at the last fill first."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: RunConfig,
        filled: dict[int, Any],
        text_1T: Tensor,
        workload: GenerationWorkload,
        name: str,
    ) -> None:
        self.model, self.config, self.workload = model, config, workload
        cache_len = workload.generated + 1
        self.at = {stop: Filled(model, config, cache, text_1T[:, stop:], cache_len) for stop, cache in filled.items()}
        self.steps: dict[int, dict[str, Any]] = {}
        self.outcome: dict[str, Any] = {"way": str(config), "batch": 0, "reason": self._wrong(name)}
        if not self.outcome["reason"]:
            self._guarded(self._begin)

    @property
    def row_seconds(self) -> float:
        """Seconds of a token of one row at the last fill; infinite where the way does not run."""
        last: float = self.steps.get(self.workload.stops[-1], {}).get("seconds", float("inf"))
        return last / max(1, int(self.outcome["batch"]))

    def whole(self, fastest: float) -> dict[str, Any]:
        """What the way gives over the whole text; `fastest`: `row_seconds` of the fastest way."""
        if self.outcome["reason"]:
            return self.outcome
        if self.row_seconds > PRUNED_BEYOND * fastest:
            times = self.row_seconds / fastest
            return self.outcome | {"reason": f"{times:.1f} times as slow as another at the end: not measured further"}
        self._guarded(self._others)
        return self.outcome if self.outcome["reason"] else self.outcome | self._added_up()

    def _wrong(self, name: str) -> str:
        rows, tokens, new = CHECKED
        ids = random_text([self.model], rows, length_needed(self.model, tokens), self.workload.seed)
        return check_config(name, self.model, self.config, reference(self.model, ids, new)).reason

    def _guarded(self, measure: Callable[[], None]) -> None:
        try:
            with attending(self.model, self.config.attention):
                measure()
        except (RuntimeError, IndexError, ValueError) as error:
            self.outcome["reason"] = f"does not run: {one_line(error)}"

    def _begin(self) -> None:
        workload, last = self.workload, self.at[self.workload.generated - 2]
        batch = last.most(workload.budget - weight_bytes(self.model), workload.most)
        peak = weight_bytes(self.model) + last.peak(batch or 1)
        self.outcome |= {"batch": batch, "capped": batch == workload.most, "peak_bytes": peak}
        if batch:
            self._step(workload.stops[-1])
        else:
            self.outcome["reason"] = "one row does not fit"

    def _others(self) -> None:
        for stop in self.workload.stops[:-1]:
            if not self.outcome["reason"]:
                self._step(stop)

    def _step(self, stop: int) -> None:
        self.steps[stop] = self.at[stop].step_seconds(self.outcome["batch"], self.workload.span)
        self.outcome["reason"] = self.steps[stop].pop("reason")

    def _added_up(self) -> dict[str, Any]:
        """Tokens per second over the whole text."""
        generated = self.workload.generated
        wall, cpu = (
            self.outcome["batch"]
            * generated
            / whole_text({at: step[kind] for at, step in self.steps.items()}, generated)
            for kind in ("seconds", "cpu_seconds")
        )
        steps = [{"fill": stop, **self.steps[stop]} for stop in sorted(self.steps)]
        return {"tokens_per_second": wall, "tokens_per_second_cpu": cpu, "steps": steps}


def whole_text(seconds: dict[int, float], generated: int) -> float:
    """Seconds of `generated` steps from those of single ones by fill: straight lines between the fills measured, level
    before the first and after the last."""
    fills = sorted(seconds)
    between = sum((b - a) * (seconds[a] + seconds[b]) / 2 for a, b in pairwise(fills))
    return fills[0] * seconds[fills[0]] + between + (generated - fills[-1]) * seconds[fills[-1]]
