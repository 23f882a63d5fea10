"""Prefill and decode at one context and batch: every model in its best way, timed in turn with the others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from linearize.errors import one_line
from linearize.evaluation.speed.equality import Check, check_config, length_needed, reference
from linearize.evaluation.speed.memory import cache_bytes, peak_bytes
from linearize.evaluation.speed.reading import decode, feed, measuring, prefill, random_text
from linearize.evaluation.speed.run_config import (
    EAGER_BYTES,
    PRUNED_BEYOND,
    CacheKind,
    RunConfig,
    attending,
    eager_bytes,
    fastest,
    new_cache,
    run_configs,
)
from linearize.evaluation.speed.timing import Timing, interleaved, now

TRIAL_TOKENS = 10
CHECKED_TOKENS = 6


Checked = dict[tuple[str, int, int], list[Check]]
"""By model, batch and length."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How things are timed. `chunk`: tokens of one forward in a prefill; `new_tokens`: tokens of one repeat of decode;
    `caches`, `attentions`: what a teacher is tried with, the usual one first."""

    new_tokens: int
    repeats: int
    prefill_repeats: int
    warmup: int
    chunk: int
    check_tokens: int
    caches: tuple[CacheKind, ...]
    attentions: tuple[str, ...]
    seed: int

    @property
    def decoded(self) -> int:
        """Tokens that a cache takes after the prefill."""
        return max(TRIAL_TOKENS, self.new_tokens)


@dataclass(kw_only=True)
class Runner:
    """One model at one point: what was found out on the way to timing it. `reason`: why there is no speed.

    `prefill_ms`, `token_ms`: trials by configuration; `cache`: after the prefill, of the kind in which decode was
    fastest; `peak`: the most bytes held with that cache.
    """

    name: str
    model: PreTrainedModel
    checks: list[Check]
    prefill_ms: dict[RunConfig, float]
    token_ms: dict[RunConfig, float]
    cache: Any = None
    peak: int = 0
    reason: str = ""

    @property
    def prefill_config(self) -> RunConfig:
        """The one to time the prefill in."""
        return fastest(self.prefill_ms)

    @property
    def config(self) -> RunConfig:
        """The one to time decode in."""
        return fastest(self.token_ms)


def measure_point(
    models: Mapping[str, PreTrainedModel],
    protocol: Protocol,
    *,
    context: int,
    batch: int,
    pruned: Mapping[str, Iterable[str]],
    checked: Checked,
) -> dict[str, Any]:
    """`points`: one row per model; `checks`: what was compared before.

    `pruned`: configurations of prefill, by model, that are not tried, since they were far behind at a shorter context.
    `checked`: what was compared at other points already; this point's checks are added.
    """
    ids_BT = random_text(list(models.values()), batch, context + protocol.decoded, protocol.seed)
    with measuring(list(models.values())):
        runners = [
            prepare(name, model, ids_BT, context, protocol, set(pruned.get(name, ())), checked)
            for name, model in models.items()
        ]
        ready = [runner for runner in runners if not runner.reason]
        prefills = _time_prefill(ready, ids_BT[:, :context], protocol)
        decodes = _time_decode(ready, ids_BT[:, context : context + protocol.new_tokens], protocol)
    rows = [_row(x, context, batch, prefills.get(x.name), decodes.get(x.name), protocol) for x in runners]
    return {"points": rows, "checks": [check.to_dict() for x in runners for check in x.checks]}


def prepare(
    name: str,
    model: PreTrainedModel,
    ids_BT: Tensor,
    context: int,
    protocol: Protocol,
    pruned: set[str],
    checked: Checked,
) -> Runner:
    """Check all configurations at a small length, then try those that are right at this context."""
    length = min(context, length_needed(model, protocol.check_tokens))
    runner = Runner(name=name, model=model, checks=[], prefill_ms={}, token_ms={})
    try:
        configs = run_configs(model, protocol.caches, protocol.attentions)
        same = (name, ids_BT.shape[0], length)
        if same not in checked:
            expected = reference(model, ids_BT[:, :length], CHECKED_TOKENS)
            checked[same] = [check_config(name, model, config, expected) for config in configs]
        runner.checks = checked[same]
        right = [config for config, check in zip(configs, runner.checks, strict=True) if check.equal]
        for cache in dict.fromkeys(config.cache for config in right):
            able = [config for config in right if config.cache == cache]
            heavy = len(able) > 1 and eager_bytes(model, ids_BT.shape[0], context, protocol.chunk) > EAGER_BYTES
            tried = [w for w in able if str(w) not in pruned and not (heavy and w.attention == "eager")]
            _try_cache(runner, able, tried or able[:1], ids_BT, context, protocol)
        if not right:
            runner.reason = "; ".join(f"{check.way}: {check.reason}" for check in runner.checks)
    except (RuntimeError, IndexError, ValueError) as error:  # out of memory, or positions beyond a model's table
        runner.reason = f"does not run at a context of {context:,}: {one_line(error)}"
        runner.cache = None
    return runner


def _try_cache(
    runner: Runner,
    decoding: Sequence[RunConfig],
    prefilling: Sequence[RunConfig],
    ids_BT: Tensor,
    context: int,
    protocol: Protocol,
) -> None:
    """Prefill with each attention, then decode a few tokens with each; the cache stays where it is the best so far."""
    room = context + protocol.decoded
    cache, peak = None, 0
    for config in prefilling:
        cache = new_cache(config, runner.model, room)
        with attending(runner.model, config.attention):
            cache, runner.prefill_ms[config], found = _try_prefill(runner.model, cache, ids_BT[:, :context], protocol)
        peak = found if config == prefilling[0] else peak
    for config in decoding:
        with attending(runner.model, config.attention):
            runner.token_ms[config] = _try_decode(runner.model, cache, ids_BT[:, context : context + TRIAL_TOKENS])
    if runner.config.cache == decoding[0].cache:
        runner.cache, runner.peak = cache, peak


def _try_prefill(model: PreTrainedModel, cache: Any, ids_BT: Tensor, protocol: Protocol) -> tuple[Any, float, int]:
    """The filled cache, milliseconds, and the most bytes held: during the last piece of the text and a token after it,
    where a prefill needs most."""
    *before, last_BT = ids_BT.split(protocol.chunk, dim=1)
    began = now()
    for piece_BT in before:
        _, cache = feed(model, cache, piece_BT)
    first_part = now() - began

    def last_piece() -> Any:
        copied = copy.deepcopy(cache)
        _, copied = feed(model, copied, last_BT)
        return decode(model, copied, last_BT[:, -1:])

    peak = peak_bytes(model.device, last_piece)
    began = now()
    _, cache = feed(model, cache, last_BT)
    return cache, (first_part + now() - began) * 1000, peak


def _try_decode(model: PreTrainedModel, cache: Any, ids_BT: Tensor) -> float:
    """The fewest milliseconds of a token, which disturbances touch least; the cache is left as it is."""
    times, cache = [], copy.deepcopy(cache)
    for token_B1 in ids_BT.split(1, dim=1):
        began = now()
        cache = decode(model, cache, token_B1)
        times.append((now() - began) * 1000)
    return min(times)


def _time_prefill(runners: Sequence[Runner], ids_BT: Tensor, protocol: Protocol) -> dict[str, Timing]:
    room = ids_BT.shape[1] + protocol.decoded

    def one(runner: Runner) -> Callable[[], Any]:
        def run() -> Any:
            cache = new_cache(runner.prefill_config, runner.model, room)
            return prefill(runner.model, cache, ids_BT, protocol.chunk)[0].argmax(dim=-1)

        return run

    with ExitStack() as stack:
        for runner in runners:
            stack.enter_context(attending(runner.model, runner.prefill_config.attention))
        return interleaved({x.name: one(x) for x in runners}, protocol.prefill_repeats, warmup=0)


def _time_decode(runners: Sequence[Runner], ids_BT: Tensor, protocol: Protocol) -> dict[str, Timing]:
    """Each repeat reads the same tokens after the same context, from a copy of the filled cache."""
    filled: dict[str, Any] = {}
    found = {runner.name: runner for runner in runners}

    def fill(name: str) -> None:
        filled.clear()
        filled[name] = copy.deepcopy(found[name].cache)

    def one(runner: Runner) -> Callable[[], Any]:
        return lambda: decode(runner.model, filled[runner.name], ids_BT)

    with ExitStack() as stack:
        for runner in runners:
            stack.enter_context(attending(runner.model, runner.config.attention))
        runs = {x.name: one(x) for x in runners}
        return interleaved(runs, protocol.repeats, warmup=protocol.warmup, before=fill)


def _row(
    runner: Runner, context: int, batch: int, filled: Timing | None, decoded: Timing | None, protocol: Protocol
) -> dict[str, Any]:
    """One point of one model. Milliseconds are medians, `ms_spread` the lowest and highest repeat."""
    row: dict[str, Any] = {"model": runner.name, "context": context, "batch": batch, "reason": runner.reason}
    if filled is None or decoded is None:
        return row
    per_token = 1000 / protocol.new_tokens
    return row | {
        "prefill_tokens_per_second": batch * context / filled.seconds,
        "ms_first_token": filled.seconds * 1000,
        "ms_first_token_spread": [filled.lowest * 1000, filled.highest * 1000],
        "decode_tokens_per_second": batch * protocol.new_tokens / decoded.seconds,
        "ms_per_token": decoded.seconds * per_token,
        "ms_spread": [decoded.lowest * per_token, decoded.highest * per_token],
        "peak_bytes": runner.peak,
        "cache_bytes": cache_bytes(runner.cache),
        "cache": runner.config.cache,
        "attention": runner.config.attention,
        "prefill_cache": runner.prefill_config.cache,
        "prefill_attention": runner.prefill_config.attention,
        "ms_trials": {
            "prefill": {str(config): ms for config, ms in runner.prefill_ms.items()},
            "token": {str(config): ms for config, ms in runner.token_ms.items()},
        },
    }


def pruned_configs(row: Mapping[str, Any]) -> set[str]:
    """Ways whose prefill was far behind another one with the same cache."""
    tried: Mapping[str, float] = row.get("ms_trials", {}).get("prefill", {})
    best: dict[str, float] = {}
    for config, ms in tried.items():
        kind = config.split(",")[0]
        best[kind] = min(ms, best.get(kind, ms))
    return {config for config, ms in tried.items() if ms > PRUNED_BEYOND * best[config.split(",")[0]]}
