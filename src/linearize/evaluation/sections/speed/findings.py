"""Judgements on speeds: are the outputs right, from which context on is the student faster, how many rows fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from linearize.evaluation.context import Finding, Numbers

Row = Mapping[str, Any]
MS, FIRST, CACHE = "ms_per_token", "ms_first_token", "cache_bytes"


def roles(numbers: Numbers) -> tuple[str | None, list[str]]:
    """The teacher's name, where there is one, and the students'."""
    names = list(numbers["models"])
    first = names[0] if numbers["models"][names[0]]["role"] == "teacher" else None
    return first, [name for name in names if name != first]


def checked(numbers: Numbers, name: str) -> list[Finding]:
    """Whether the timed outputs are right; the reasons where there is no speed."""
    student = name if numbers["models"][name]["role"] == "student" else None
    missing = [row for row in numbers["points"] if row["model"] == name and row["reason"]]
    if missing:
        where = ", ".join(f"{row['context']:,} x {row['batch']}" for row in missing)
        return [Finding(level="bad", student=student, text=f"{name}: no speed at {where}: {missing[0]['reason']}")]
    checks = [check for check in numbers["checks"] if check["model"] == name and check["equal"]]
    if not checks:
        return []
    worst = max(checks, key=lambda check: check["difference"] / max(check["allowed"], 1e-12))
    return [
        Finding(
            level="good",
            student=student,
            text=f"{name}: what was timed gives the logits and greedy tokens of a plain forward (largest difference "
            f"{worst['difference']:.1g}, allowed {worst['allowed']:.1g})",
        )
    ]


def against(numbers: Numbers, name: str, teacher: str) -> list[Finding]:
    """From which context on the student decodes faster, and how it stands at the longest."""
    pairs = pairs_of(numbers, name, teacher)
    if not pairs:
        return []
    own, other = pairs[-1]
    ratio, prefill = other[MS] / own[MS], other[FIRST] / own[FIRST]
    at = f"at {tokens_text(own['context'])} of context"
    memory = f"cache {binary_size(own[CACHE])} against {binary_size(other[CACHE])}"
    faster = _faster_from(pairs)
    if faster is not None:
        where = "at every context measured" if faster == pairs[0][0]["context"] else f"from {tokens_text(faster)} on"
        told = f"decodes faster than the teacher {where}; {at} {times_text(ratio)} as fast"
    elif own["ms_spread"][0] > other["ms_spread"][1]:
        slower = all(one[MS] > two[MS] for one, two in pairs)
        told = f"decodes slower than the teacher {'at every context measured; ' if slower else ''}{at}: "
        told += f"{own[MS]:.3g} ms a token against {other[MS]:.3g}"
    else:
        told = f"decodes as fast as the teacher {at}, within the spread of repeats: {own[MS]:.3g} ms a token against "
        told += f"{other[MS]:.3g}"
    text = f"{name} {told}; prefill {times_text(prefill)} as fast; {memory}"
    findings = [Finding(level="note" if faster is None else "good", student=name, text=text)]
    rows = numbers["largest_batch"]["models"]
    if rows.get(name, {}).get("batch") and rows.get(teacher, {}).get("batch"):
        findings.append(_batch_finding(numbers, name, rows[name], rows[teacher]))
    return findings


def _batch_finding(numbers: Numbers, name: str, own: Row, other: Row) -> Finding:
    budget = numbers["largest_batch"]["budget_bytes"]
    if own["reason"]:
        return Finding(level="bad", student=name, text=f"{name}: no speed at its largest batch: {own['reason']}")
    speeds = "" if other["reason"] else f" ({rate_text(own)} against {rate_text(other)} tokens/s)"
    more = "at least " if own["capped"] else ""
    text = f"{name}: {more}{own['batch']:,} rows of {numbers['largest_batch']['context']:,} tokens decode at once in "
    return Finding(
        level="good" if own["batch"] > other["batch"] else "note",
        student=name,
        text=f"{text}{binary_size(budget)}, the teacher's {other['batch']:,}{speeds}",
    )


def pairs_of(numbers: Numbers, name: str, teacher: str) -> list[tuple[Row, Row]]:
    """Student and teacher at the smallest batch, by context, where both have speeds."""
    batch = min(numbers["settings"]["batches"])
    found = {(r["model"], r["context"]): r for r in numbers["points"] if r["batch"] == batch and not r["reason"]}
    contexts = sorted({context for _, context in found})
    return [(found[name, c], found[teacher, c]) for c in contexts if (name, c) in found and (teacher, c) in found]


def _faster_from(pairs: Sequence[tuple[Row, Row]]) -> int | None:
    """The smallest context from which on every one is faster, the longest one beyond the spread of repeats."""
    own, other = pairs[-1]
    if own["ms_spread"][1] >= other["ms_spread"][0]:
        return None
    start = own["context"]
    for own, other in reversed(pairs):
        if own[MS] >= other[MS]:
            break
        start = own["context"]
    return int(start)


def tokens_text(count: int) -> str:
    """4096 as `4,096 tokens`."""
    return f"{count:,} tokens"


def rate_text(row: Row) -> str:
    """Decoded tokens per second."""
    return f"{row['decode_tokens_per_second']:,.0f}"


def times_text(ratio: float) -> str:
    """Two digits, as `3.1x`."""
    return f"{ratio:.2g}x" if ratio < 10 else f"{ratio:.0f}x"


def binary_size(count: float) -> str:
    """Bytes with three digits: 3,145,728 as `3 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.3g} GiB"
