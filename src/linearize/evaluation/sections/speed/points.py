"""Prefill and decode at one context and batch: every model in its fastest configuration, in turn with the others.

Letters: B rows, T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from linearize.errors import one_line
from linearize.evaluation.sections.speed.numbers import Point, SpeedSettings, TimedPoint, Trials, decode_speed
from linearize.evaluation.speed.equality import Check
from linearize.evaluation.speed.memory import cache_bytes, peak_bytes
from linearize.evaluation.speed.running import (
    DecodeRun,
    RunConfig,
    Timing,
    attending,
    decode,
    fastest,
    feed,
    interleaved,
    measuring,
    new_cache,
    now,
    prefill,
    random_text,
    run_configs,
    time_decode,
)

TRIAL_TOKENS = 10
EAGER_BYTES = 2**30  # scores of one layer beyond which a prefill with eager attention is not tried


@dataclass(kw_only=True)
class Candidate:
    """One model at one point. `prefill_ms`, `token_ms`: trials by configuration; `cache`: after the prefill, of the
    kind in which decode was fastest; `peak`: the most bytes taken with that cache; `reason`: why there is no speed."""

    name: str
    model: PreTrainedModel
    prefill_ms: dict[RunConfig, float] = field(default_factory=dict)
    token_ms: dict[RunConfig, float] = field(default_factory=dict)
    cache: Any = None
    peak: int = 0
    reason: str = ""

    @property
    def prefill_config(self) -> RunConfig:
        """The configuration in which prefill is timed."""
        return fastest(self.prefill_ms)

    @property
    def config(self) -> RunConfig:
        """The configuration in which decode is timed."""
        return fastest(self.token_ms)


def measure_point(
    models: Mapping[str, PreTrainedModel],
    checks: Mapping[str, Sequence[Check]],
    settings: SpeedSettings,
    *,
    context: int,
    batch: int,
    seed: int,
) -> list[TimedPoint | Point]:
    """Return one point per model; `checks`: by model, of each of its configurations; the right ones are tried."""
    ids_BT = random_text(list(models.values()), batch, context + _decoded(settings), seed)
    with measuring(list(models.values())):
        candidates = [_tried(name, model, checks[name], ids_BT, context, settings) for name, model in models.items()]
        ready = [candidate for candidate in candidates if not candidate.reason]
        prefills = _time_prefill(ready, ids_BT[:, :context], settings)
        runs = {
            c.name: DecodeRun(model=c.model, config=c.config, filled=partial(copy.deepcopy, c.cache)) for c in ready
        }
        new_BT = ids_BT[:, context : context + settings.new_tokens]
        decodes = time_decode(runs, new_BT, settings.repeats, warmup=settings.warmup)
    return [
        Point(model=c.name, context=context, batch=batch, reason=c.reason)
        if c.reason
        else _timed(c, context, batch, settings.new_tokens, prefills[c.name], decodes[c.name])
        for c in candidates
    ]


def _decoded(settings: SpeedSettings) -> int:
    """Tokens that a cache takes after the prefill."""
    return max(TRIAL_TOKENS, settings.new_tokens)


def _tried(
    name: str, model: PreTrainedModel, checks: Sequence[Check], ids_BT: Tensor, context: int, settings: SpeedSettings
) -> Candidate:
    """Try the configurations with right outputs at this context."""
    candidate = Candidate(name=name, model=model)
    configs = run_configs(model, settings.caches, settings.attentions)
    right = [config for config, check in zip(configs, checks, strict=True) if check.equal]
    if not right:
        candidate.reason = "; ".join(f"{check.way}: {check.reason}" for check in checks)
    heavy = eager_bytes(model, len(ids_BT), context, settings.chunk) > EAGER_BYTES
    try:
        for cache in dict.fromkeys(config.cache for config in right):
            decoding = [config for config in right if config.cache == cache]
            light = [config for config in decoding if not (heavy and config.attention == "eager")]
            _try_cache(candidate, decoding, light or decoding[:1], ids_BT, context, settings)
    except (RuntimeError, IndexError, ValueError) as error:  # out of memory, or positions beyond a model's table
        candidate.reason = f"does not run at a context of {context:,}: {one_line(error)}"
        candidate.cache = None
    return candidate


def eager_bytes(model: PreTrainedModel, batch: int, context: int, chunk: int) -> int:
    """Bytes of one layer's softmax scores in fp32 where they are written out, as eager attention does."""
    heads: int = model.config.get_text_config().num_attention_heads
    return 4 * batch * heads * context * min(chunk, context)


def _try_cache(
    candidate: Candidate,
    decoding: Sequence[RunConfig],
    prefilling: Sequence[RunConfig],
    ids_BT: Tensor,
    context: int,
    settings: SpeedSettings,
) -> None:
    """Prefill with each attention, then decode a few tokens with each; the cache stays where it is the best so far."""
    model, cache, peaks = candidate.model, None, []
    for config in prefilling:
        cache = new_cache(config, model, context + _decoded(settings))
        with attending(model, config.attention):
            cache, candidate.prefill_ms[config], peak = _try_prefill(model, cache, ids_BT[:, :context], settings.chunk)
        peaks.append(peak)
    for config in decoding:
        with attending(model, config.attention):
            candidate.token_ms[config] = _try_decode(model, cache, ids_BT[:, context : context + TRIAL_TOKENS])
    if candidate.config.cache == decoding[0].cache:
        candidate.cache, candidate.peak = cache, peaks[0]


def _try_prefill(model: PreTrainedModel, cache: Any, ids_BT: Tensor, chunk: int) -> tuple[Any, float, int]:
    """Return the filled cache, milliseconds, and the most bytes taken: during the last chunk of the text and a token
    after it, where a prefill needs most."""
    *before, last_BT = ids_BT.split(chunk, dim=1)
    began = now()
    for chunk_BT in before:
        _, cache = feed(model, cache, chunk_BT)
    first_part = now() - began

    def last_chunk() -> Any:
        _, copied = feed(model, copy.deepcopy(cache), last_BT)
        return decode(model, copied, last_BT[:, -1:])

    peak = peak_bytes(model.device, last_chunk)
    began = now()
    _, cache = feed(model, cache, last_BT)
    return cache, (first_part + now() - began) * 1000, peak


def _try_decode(model: PreTrainedModel, cache: Any, ids_BT: Tensor) -> float:
    """Return the fewest milliseconds of a token, which disturbances touch least; the cache is left as it is."""
    times, cache = [], copy.deepcopy(cache)
    for token_B1 in ids_BT.split(1, dim=1):
        began = now()
        cache = decode(model, cache, token_B1)
        times.append((now() - began) * 1000)
    return min(times)


def _time_prefill(candidates: Sequence[Candidate], ids_BT: Tensor, settings: SpeedSettings) -> dict[str, Timing]:
    capacity = ids_BT.shape[1] + _decoded(settings)

    def run(candidate: Candidate) -> Callable[[], Any]:
        model, config = candidate.model, candidate.prefill_config
        return lambda: prefill(model, new_cache(config, model, capacity), ids_BT, settings.chunk)[0].argmax(dim=-1)

    with ExitStack() as stack:
        for candidate in candidates:
            stack.enter_context(attending(candidate.model, candidate.prefill_config.attention))
        return interleaved({c.name: run(c) for c in candidates}, settings.prefill_repeats, warmup=0)


def _timed(
    candidate: Candidate, context: int, batch: int, new_tokens: int, prefilled: Timing, decoded: Timing
) -> TimedPoint:
    first_token, first_spread = prefilled.ms_per_token(1)
    return TimedPoint(
        model=candidate.name, context=context, batch=batch, reason="",
        prefill_tokens_per_second=batch * context / prefilled.seconds,
        ms_first_token=first_token, ms_first_token_spread=first_spread,
        peak_bytes=candidate.peak, cache_bytes=cache_bytes(candidate.cache),
        cache=candidate.config.cache, attention=candidate.config.attention,
        prefill_cache=candidate.prefill_config.cache, prefill_attention=candidate.prefill_config.attention,
        ms_trials=Trials(
            prefill={str(config): ms for config, ms in candidate.prefill_ms.items()},
            token={str(config): ms for config, ms in candidate.token_ms.items()},
        ),
        **decode_speed(decoded, batch, new_tokens).to_json(),
    )  # fmt: skip
