"""The speed section as people read it: whether outputs are right, where the student is faster, how many rows fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from linearize.evaluation.context import Cell, Finding, Plot, SectionView, Stat, Table
from linearize.evaluation.sections.speed.numbers import (
    LargestBatch,
    Point,
    SpeedNumbers,
    TimedPoint,
    TimedRows,
)
from linearize.evaluation.speed.equality import Check
from linearize.metrics.theme import bytes_label, colours, legend_below, log_log, plain_label
from linearize.numbers import size_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTS: tuple[tuple[str, str, str, Callable[[TimedPoint], float], Callable[..., str]], ...] = (
    (
        "decode_time",
        "ms per token",
        "Milliseconds of one decoded token against the tokens before it: a softmax teacher's line rises, that of a "
        "linear student stays flat.",
        lambda point: point.ms_per_token,
        plain_label,
    ),
    (
        "cache_memory",
        "cache",
        "Bytes of the cache against the tokens read: the teacher's grows with every token.",
        lambda point: point.cache_bytes,
        bytes_label,
    ),
    (
        "prefill_speed",
        "prefill tokens/s",
        "Tokens read per second in the prefill against the length of the text; higher is faster.",
        lambda point: point.prefill_tokens_per_second,
        lambda value, position=None: f"{value / 1000:.3g}k" if value >= 1000 else f"{value:.3g}",
    ),
)
"""Name, axis label, caption, what is drawn, and how its axis is labelled."""


def present(numbers: SpeedNumbers) -> SectionView:
    """Return the section as people read it."""
    findings = [finding for name in numbers.models for finding in _checked(numbers, name)]
    if numbers.teacher is not None:
        students = [name for name in numbers.models if name != numbers.teacher]
        findings += [finding for name in students for finding in _against_teacher(numbers, name)]
    return SectionView(
        summary=_summary(numbers),
        findings=findings,
        tables=_tables(numbers),
        plots=_plots(numbers) if numbers.timed else [],
    )


def headline(numbers: SpeedNumbers) -> Mapping[str, Sequence[Stat]]:
    """Return decode speed, prefill speed and cache memory next to the teacher's, at the longest context."""
    stats: dict[str, list[Stat]] = {}
    for name in numbers.models:
        if name == numbers.teacher or not (pairs := numbers.pairs(name)):
            continue
        own, other = pairs[-1]
        at = f"at {own.context:,} tokens of context"
        decode, prefill = _ratios(own, other)
        memory = f"a row {at}; the teacher's takes {_size(other.cache_bytes)}"
        stats[name] = [
            Stat(label="Decode speed", value=decode, detail=f"the teacher's, {at}"),
            Stat(label="Prefill speed", value=prefill, detail=f"the teacher's, {at}"),
            Stat(label="Cache memory", value=_size(own.cache_bytes), detail=memory),
        ]
    return stats


def _ratios(own: TimedPoint, other: TimedPoint) -> tuple[str, str]:
    """Return how many times as fast decode and prefill are: `3.1x`."""
    ratios = other.ms_per_token / own.ms_per_token, other.ms_first_token / own.ms_first_token
    decode, prefill = (f"{ratio:.2g}x" if ratio < 10 else f"{ratio:.0f}x" for ratio in ratios)
    return decode, prefill


def _size(count: float) -> str:
    return size_text(count, binary=True)


def _summary(numbers: SpeedNumbers) -> str:
    settings, first = numbers.settings, next(iter(numbers.models.values()))
    caches, attentions = " and ".join(settings.caches), " and ".join(settings.attentions)
    text = (
        f"Random text in {first.dtype} on {'a GPU' if first.device == 'cuda' else 'the CPU'}, models in turn: medians "
        f"of {settings.repeats} repeats of {settings.new_tokens} tokens, and of {settings.prefill_repeats} prefills "
        f"in chunks of at most {settings.chunk:,} tokens. A teacher runs in the fastest of {caches} cache with "
        f"{attentions} attention, a student with its own cache."
    )
    lengths = [model.trained_length for model in numbers.models.values() if model.trained_length]
    if lengths and min(lengths) < max(settings.contexts):
        text += f" Contexts beyond {min(lengths):,} tokens, the trained length, are for speed only."
    return text


def _checked(numbers: SpeedNumbers, name: str) -> list[Finding]:
    """Whether the timed outputs are right; the reasons where there is no speed."""
    role = numbers.models[name].role
    missing = [point for point in numbers.points if point.model == name and point.reason]
    if missing:
        where = ", ".join(f"{point.context:,} x {point.batch}" for point in missing)
        return [Finding.on(name, role, "bad", f"no speed at {where}: {missing[0].reason}")]
    checks = [check for check in numbers.checks if check.model == name and check.equal]
    if not checks:
        return []
    worst = max(checks, key=lambda check: (check.difference or 0.0) / max(check.allowed, 1e-12))
    text = (
        "the timed configurations give the logits and greedy tokens of a plain forward (largest difference "
        f"{worst.difference or 0.0:.1g}, allowed {worst.allowed:.1g})"
    )
    return [Finding.on(name, role, "good", text)]


def _against_teacher(numbers: SpeedNumbers, name: str) -> list[Finding]:
    """From which context on the student decodes faster, and whether its largest batch has a speed."""
    pairs = numbers.pairs(name)
    if not pairs:
        return []
    own, other = pairs[-1]
    (decode, _), faster = _ratios(own, other), _faster_from(pairs)
    times = f"{own.ms_per_token:.3g} ms a token against {other.ms_per_token:.3g}"
    if faster is not None:
        where = "at every context measured" if faster == pairs[0][0].context else f"from {faster:,} tokens on"
        verdict = f"decodes faster than the teacher {where}"
    elif own.ms_spread[0] > other.ms_spread[1]:
        verdict = "decodes slower than the teacher"
    else:
        verdict = "decodes as fast as the teacher, within the spread of repeats"
    text = f"{name} {verdict}; at {own.context:,} tokens of context {times} ({decode} as fast)"
    findings = [Finding(level="note" if faster is None else "good", student=name, text=text)]
    rows = numbers.largest_batch.models.get(name)
    if rows is not None and rows.batch and not isinstance(rows, TimedRows):
        findings.append(Finding.on(name, "student", "bad", f"no speed at its largest batch: {rows.reason}"))
    return findings


def _faster_from(pairs: Sequence[tuple[TimedPoint, TimedPoint]]) -> int | None:
    """Return the smallest context from which on every one is faster, the longest one beyond the spread of repeats."""
    own, other = pairs[-1]
    if own.ms_spread[1] >= other.ms_spread[0]:
        return None
    start = own.context
    for own, other in reversed(pairs):
        if own.ms_per_token >= other.ms_per_token:
            break
        start = own.context
    return start


def _tables(numbers: SpeedNumbers) -> list[Table]:
    weights = ", ".join(f"{name} {_size(model.weight_bytes)}" for name, model in numbers.models.items())
    note = (
        "Cache: after the prefill (a static one holds space for the new tokens). Peak: cache and activations in the "
        f"last chunk of the prefill and a token after it, without the weights. Weights: {weights}."
    )
    tables = [Table(title="Prefill, decode and memory", rows=[_speed_cells(p) for p in numbers.points], note=note)]
    if numbers.largest_batch.models:
        tables.append(_batch_table(numbers.largest_batch))
    checks = [_check_cells(check) for check in numbers.checks]
    note = "Logits through the cache against a plain forward over the text, prefilled at once and in several chunks."
    return [*tables, Table(title="Outputs checked before timing", rows=checks, note=note)]


def _speed_cells(point: Point) -> dict[str, Cell]:
    cells: dict[str, Cell] = {"model": point.model, "context": f"{point.context:,}", "batch": point.batch}
    if not isinstance(point, TimedPoint):
        columns = ("prefill tokens/s", "first token", "decode tokens/s", "a token", "cache", "peak")
        return cells | dict.fromkeys(columns) | {"configuration": point.reason}
    decode = f"{point.cache} cache, {point.attention}"
    prefill = f"{point.prefill_cache} cache, {point.prefill_attention}"
    return cells | {
        "prefill tokens/s": f"{point.prefill_tokens_per_second:,.0f}",
        "first token": f"{point.ms_first_token:,.4g} ms",
        "decode tokens/s": point.rate,
        "a token": point.step,
        "cache": _size(point.cache_bytes),
        "peak": _size(point.peak_bytes),
        "configuration": decode if decode == prefill else f"{decode}; prefill: {prefill}",
    }


def _batch_table(largest: LargestBatch) -> Table:
    rows: list[dict[str, Cell]] = [
        {
            "model": name,
            "rows": f"{rows.batch:,}{' (not more tried)' if rows.capped else ''}",
            "memory": None if rows.peak_bytes is None else _size(rows.peak_bytes),
            "decode tokens/s": rows.rate if isinstance(rows, TimedRows) else rows.reason,
            "a step": rows.step if isinstance(rows, TimedRows) else None,
        }
        for name, rows in largest.models.items()
    ]
    source = "" if largest.budget_from == "given" else f" The budget is what {largest.budget_from} take."
    note = "Caches and activations of a decode step, without the weights; each row was prefilled alone." + source
    return Table(title=f"Largest batch at {largest.place}", rows=rows, note=note)


def _check_cells(check: Check) -> dict[str, Cell]:
    return {
        "model": check.model,
        "configuration": check.way,
        "batch": check.batch,
        "tokens": check.tokens,
        "largest difference": None if check.difference is None else f"{check.difference:.2g}",
        "allowed": f"{check.allowed:.2g}",
        "equal": "yes" if check.equal else check.error or "no",
    }


def _plots(numbers: SpeedNumbers) -> list[Plot]:
    """Return a plot per row of PLOTS: a line per model and batch (the smallest, and the largest dashed), both axes
    logarithmic."""
    points = numbers.timed
    batches, contexts = sorted({p.batch for p in points}), sorted({p.context for p in points})
    styles = {batches[-1]: "--", batches[0]: "-"}

    def draw(figure: Figure, label: str, value: Callable[[TimedPoint], float], formatter: Callable[..., str]) -> None:
        from matplotlib.ticker import LogLocator

        axis = figure.subplots()
        for name, colour in colours(numbers.models).items():
            for batch in sorted(styles):
                own = [point for point in points if point.model == name and point.batch == batch]
                legend = name if len(styles) == 1 else f"{name}, batch {batch}"
                if own:
                    x, y = [point.context for point in own], [value(point) for point in own]
                    axis.plot(x, y, styles[batch], marker="o", color=colour, label=legend)
        log_log(axis, formatter)
        if formatter is not bytes_label:
            axis.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axis.set_xticks(contexts)
        axis.minorticks_off()
        axis.set_xlabel("context (tokens)")
        axis.set_ylabel(label)
        legend_below(figure)

    return [
        Plot(name=name, caption=caption, draw=lambda figure, rest=(label, value, form): draw(figure, *rest))  # type: ignore[misc]
        for name, label, caption, value, form in PLOTS
    ]
