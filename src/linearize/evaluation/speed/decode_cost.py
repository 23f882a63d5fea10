"""What one more token costs at a given context: time, and bytes of cache, for student and teacher.

The teacher decodes with a preallocated StaticCache: growing a DynamicCache copies all keys and values for every token,
which would flatter the student. The section `speed` measures more, and looks for the teacher's fastest configuration.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from linearize.errors import InputError
from linearize.evaluation.speed.memory import cache_bytes
from linearize.evaluation.speed.running import (
    DecodeRun,
    RunConfig,
    measuring,
    new_cache,
    prefill,
    random_text,
    time_decode,
)
from linearize.metrics.plots import figure_files, new_figure
from linearize.metrics.theme import COLOURS, bytes_label, legend_below, log_log, plain_label


@dataclass(frozen=True, kw_only=True)
class DecodeCost:
    """One model at one context. `ms_per_token` is the median over repeats, `ms_spread` their (lowest, highest)."""

    model: str
    context: int
    batch: int
    ms_per_token: float
    ms_spread: tuple[float, float]
    cache_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)


def decode_cost(
    student: PreTrainedModel | None,
    teacher: PreTrainedModel | None,
    *,
    contexts: Sequence[int] = (256, 1024, 4096),
    batch: int = 1,
    repeats: int = 5,
    tokens: int = 8,
    warmup: int = 1,
    chunk: int = 512,
    seed: int = 0,
) -> list[DecodeCost]:
    """Decode time and cache bytes of both models at each context, teacher with a static, student with its own cache.

    The context is random text, prefilled `chunk` tokens at a time; then the same `tokens` tokens are read after it
    `repeats` times, and `warmup` times before that untimed. Contexts beyond the model's trained length are allowed.
    Raises InputError for a size below 1.
    """
    for name, size in {"batch": batch, "repeats": repeats, "tokens": tokens, "chunk": chunk}.items():
        if size < 1:
            raise InputError(f"decode cost: {name} is {size}: it must be at least 1")
    if min(contexts, default=0) < 1:
        raise InputError(f"decode cost: contexts {list(contexts)}: give at least one, each at least 1")
    models = {name: model for name, model in (("teacher", teacher), ("student", student)) if model is not None}
    costs = []
    for context in sorted(contexts):
        for name, model in models.items():
            ids_BT = random_text([model], batch, context + tokens, seed)
            config = RunConfig("static" if name == "teacher" else "own", model.config._attn_implementation)
            with measuring([model]):
                _, cache = prefill(model, new_cache(config, model, context + tokens), ids_BT[:, :context], chunk)
                run = DecodeRun(model=model, config=config, filled=partial(copy.deepcopy, cache))
                timing = time_decode({name: run}, ids_BT[:, context:], repeats, warmup=warmup)[name]
            ms, spread = timing.ms_per_token(tokens)
            costs.append(
                DecodeCost(
                    model=name, context=context, batch=batch, ms_per_token=ms, ms_spread=spread,
                    cache_bytes=cache_bytes(cache),
                )
            )  # fmt: skip
    return costs


def plot_decode_cost(costs: Sequence[DecodeCost], folder: Path | str) -> list[Path]:
    """Time per token and cache bytes against context, log-log; files `decode_cost.svg` and `.png`."""
    with new_figure(Path(folder) / "decode_cost", panels=2, width=8.6) as (figure, (left, right)):
        for name in ("teacher", "student"):
            own = [cost for cost in costs if cost.model == name]
            contexts = [cost.context for cost in own]
            label = "teacher, preallocated cache" if name == "teacher" else "student"
            style: dict[str, Any] = {"marker": "o", "markersize": 4, "color": COLOURS[name]}
            low, high = zip(*(cost.ms_spread for cost in own), strict=True) if own else ((), ())
            left.fill_between(contexts, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
            left.plot(contexts, [cost.ms_per_token for cost in own], **style, label=label)
            right.plot(contexts, [cost.cache_bytes for cost in own], **style)
        for axis, title, formatter in (
            (left, "Decode time (ms per token)", plain_label),
            (right, "Cache memory", bytes_label),
        ):
            log_log(axis, formatter)
            axis.set(title=title, xlabel="context (tokens)")
        legend_below(figure)
    return figure_files(folder, "decode_cost")
