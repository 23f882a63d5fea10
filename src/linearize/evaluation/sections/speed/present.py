"""Speeds as people read them, from the JSON numbers: findings, tables, plots, stats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from linearize.evaluation.context import Cell, Numbers, SectionView, Stat, Table
from linearize.evaluation.sections.speed.findings import (
    CACHE,
    FIRST,
    MS,
    Row,
    against,
    binary_size,
    checked,
    pairs_of,
    rate_text,
    roles,
    times_text,
    tokens_text,
)
from linearize.evaluation.sections.speed.plots import speed_plots


def present(numbers: Numbers) -> SectionView:
    """All of the section."""
    teacher, students = roles(numbers)
    findings = [found for name in numbers["models"] for found in checked(numbers, name)]
    if teacher is not None:
        findings += [found for name in students for found in against(numbers, name, teacher)]
    points = [row for row in numbers["points"] if not row["reason"]]
    return SectionView(
        summary=_summary(numbers),
        findings=findings,
        tables=_tables(numbers),
        plots=speed_plots(numbers, points) if points else [],
    )


def headline(numbers: Numbers) -> Mapping[str, Sequence[Stat]]:
    """Decode speed, prefill speed and cache memory beside the teacher's, at the longest context."""
    teacher, students = roles(numbers)
    stats: dict[str, list[Stat]] = {}
    for name in students if teacher is not None else ():
        pairs = pairs_of(numbers, name, str(teacher))
        if not pairs:
            continue
        own, other = pairs[-1]
        at = f"at {tokens_text(own['context'])} of context"
        stats[name] = [
            Stat(label="Decode speed", value=times_text(other[MS] / own[MS]), detail=f"the teacher's, {at}"),
            Stat(label="Prefill speed", value=times_text(other[FIRST] / own[FIRST]), detail=f"the teacher's, {at}"),
            Stat(
                label="Cache memory",
                value=binary_size(own[CACHE]),
                detail=f"a row {at}; the teacher's takes {binary_size(other[CACHE])}",
            ),
        ]
    return stats


def _summary(numbers: Numbers) -> str:
    settings, first = numbers["settings"], next(iter(numbers["models"].values()))
    tried = " and ".join(settings["caches"]), " and ".join(settings["attentions"])
    text = (
        f"Random text in {first['dtype']} on {'a GPU' if first['device'] == 'cuda' else 'the CPU'}, models in turn: "
        f"medians of {settings['repeats']} repeats of {settings['new_tokens']} tokens, and of "
        f"{settings['prefill_repeats']} prefills in pieces of at most {settings['chunk']:,} tokens. A teacher runs in "
        f"the fastest of {tried[0]} cache with {tried[1]} attention, a student with its own cache."
    )
    longest = max(settings["contexts"])
    lengths = {model["trained_length"] for model in numbers["models"].values() if model["trained_length"]}
    if lengths and min(lengths) < longest:
        text += f" Contexts beyond {min(lengths):,} tokens, the trained length, are for speed only."
    return text


def _tables(numbers: Numbers) -> list[Table]:
    tables = [
        Table(title="Prefill and decode", rows=[_speed_cells(row) for row in numbers["points"]]),
        Table(
            title="Memory of a run",
            rows=[_memory_cells(row) for row in numbers["points"] if not row["reason"]],
            note="Cache: after the prefill (a static one has room for the new tokens). Peak: cache and activations in "
            "the last piece of the prefill and a token after it, without the weights. Weights: "
            + ", ".join(f"{name} {binary_size(model['weight_bytes'])}" for name, model in numbers["models"].items())
            + ".",
        ),
    ]
    if numbers["largest_batch"]["models"]:
        tables.append(_batch_table(numbers["largest_batch"]))
    checks = [_check_cells(check) for check in numbers["checks"]]
    note = "Logits through the cache against a plain forward over the text, prefilled in one piece and in several."
    return [*tables, Table(title="Outputs checked before timing", rows=checks, note=note)]


def _batch_table(largest: Row) -> Table:
    source = "" if largest["budget_from"] == "given" else f" The budget is what {largest['budget_from']} take."
    place = f"at {tokens_text(largest['context'])} of context in {binary_size(largest['budget_bytes'])}"
    return Table(
        title=f"Largest batch {place}",
        rows=[_batch_cells(name, row) for name, row in largest["models"].items()],
        note="Caches and activations of a decode step, without the weights; each row was prefilled alone." + source,
    )


def _speed_cells(row: Row) -> dict[str, Cell]:
    cells: dict[str, Cell] = {"model": row["model"], "context": f"{row['context']:,}", "batch": row["batch"]}
    if row["reason"]:
        return cells | {"how": row["reason"]} | dict.fromkeys(("prefill tokens/s", "first token", "decode tokens/s"))
    low, high = row["ms_spread"]
    return cells | {
        "prefill tokens/s": f"{row['prefill_tokens_per_second']:,.0f}",
        "first token": f"{row[FIRST]:,.4g} ms",
        "decode tokens/s": rate_text(row),
        "a token": f"{row[MS]:.3g} ms ({low:.3g} to {high:.3g})",
        "how": _how(row),
    }


def _how(row: Row) -> str:
    decode = f"{row['cache']} cache, {row['attention']}"
    fill = f"{row['prefill_cache']} cache, {row['prefill_attention']}"
    return decode if decode == fill else f"{decode}; prefill: {fill}"


def _memory_cells(row: Row) -> dict[str, Cell]:
    return {
        "model": row["model"],
        "context": f"{row['context']:,}",
        "batch": row["batch"],
        "cache": binary_size(row[CACHE]),
        "peak": binary_size(row["peak_bytes"]),
    }


def _batch_cells(name: str, row: Row) -> dict[str, Cell]:
    timed = "decode_tokens_per_second" in row
    return {
        "model": name,
        "rows": f"{row['batch']:,}{' (not more tried)' if row.get('capped') else ''}",
        "memory": binary_size(row["peak_bytes"]) if "peak_bytes" in row else None,
        "decode tokens/s": rate_text(row) if timed else row["reason"],
        "a step": f"{row[MS]:.3g} ms ({row['ms_spread'][0]:.3g} to {row['ms_spread'][1]:.3g})" if timed else None,
    }


def _check_cells(check: Row) -> dict[str, Cell]:
    measured = check["difference"] is not None
    return {
        "model": check["model"],
        "way": check["way"],
        "batch": check["batch"],
        "tokens": check["tokens"],
        "largest difference": f"{check['difference']:.2g}" if measured else None,
        "allowed": f"{check['allowed']:.2g}",
        "equal": "yes" if check["equal"] else check["error"] or "no",
    }
