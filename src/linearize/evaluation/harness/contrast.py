"""Student against teacher on the same items: differences, shares of what the teacher is above chance, averages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from linearize.evaluation.harness.outcome import Outcome
from linearize.metrics.intervals import Z95, paired_difference

CLEAR = 3.0  # a share is reported where the teacher stands so many standard errors above chance


def summary(found: Mapping[str, Mapping[str, Outcome]], teacher: str | None) -> dict[str, Any]:
    """What stands in the report: by model and task without the single items, and students against the teacher."""
    numbers: dict[str, Any] = {"models": {}, "averages": {}, "against_teacher": {}, "kept": {}}
    for name, rows in found.items():
        numbers["models"][name] = {task: _row(row) for task, row in rows.items()}
        numbers["averages"][name] = averages(rows)
        if teacher is not None and name != teacher:
            theirs = found[teacher]
            numbers["against_teacher"][name] = {task: contrast(theirs[task], row) for task, row in rows.items()}
            numbers["kept"][name] = average_kept(theirs, rows)
    return numbers


def _row(row: Outcome) -> dict[str, Any]:
    shown = {key: value for key, value in row.items() if key not in ("items", "chance")}
    n = len(row["items"])
    score = math.fsum(row["items"]) / n
    return {**shown, "score": score, "stderr": standard_error(row["items"]), "chance": math.fsum(row["chance"]) / n}


def contrast(teacher: Outcome, student: Outcome) -> dict[str, Any]:
    """The mean difference student - teacher over the items, its standard error and 95% interval, and the share kept."""
    assert teacher["prompts"] == student["prompts"], "teacher and student were asked different things"
    ours, theirs = student["items"], teacher["items"]
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    found = paired_difference(ours, theirs)
    return {
        "difference": found.value,
        "difference_stderr": standard_error(differences),
        "low": found.low,
        "high": found.high,
        "n": found.n,
        "share": share_kept(theirs, ours, teacher["chance"]),
    }


def share_kept(teacher: Sequence[float], student: Sequence[float], chance: Sequence[float]) -> dict[str, float] | None:
    """(student - chance) / (teacher - chance), its standard error (delta method, paired items) and 95% interval.

    None where the teacher is not clearly above chance: the share would be noise divided by noise.
    """
    above = [t - c for t, c in zip(teacher, chance, strict=True)]
    error = standard_error(above)
    mean = math.fsum(above) / len(above) if above else 0.0
    if error is None or mean <= CLEAR * error or mean <= 0:
        return None
    share = math.fsum(s - c for s, c in zip(student, chance, strict=True)) / math.fsum(above)
    influence = [(s - c - share * a) / mean for s, c, a in zip(student, chance, above, strict=True)]
    spread = standard_error(influence) or 0.0
    return {"value": share, "stderr": spread, "low": share - Z95 * spread, "high": share + Z95 * spread}


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent items, as lm-eval has it; None for fewer than two."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def averages(rows: Mapping[str, Outcome]) -> dict[str, Any]:
    """The plain mean over tasks of the first metric, with and without MMLU: an average hides what MMLU loses.

    Perplexities and the like, which are no shares, stay out.
    """
    shares = {task: row for task, row in rows.items() if not row["lower_is_better"]}
    without = {task: row for task, row in shares.items() if not task.startswith("mmlu")}
    found = {"all": _average(shares)}
    return {**found, "without_mmlu": _average(without)} if 0 < len(without) < len(shares) else found


def _average(rows: Mapping[str, Outcome]) -> dict[str, Any]:
    means = [math.fsum(row["items"]) / len(row["items"]) for row in rows.values()]
    errors = [standard_error(row["items"]) or 0.0 for row in rows.values()]
    k = max(len(rows), 1)
    error = math.sqrt(math.fsum(e * e for e in errors)) / k
    return {"value": math.fsum(means) / k, "stderr": error, "tasks": list(rows)}


def average_kept(teacher: Mapping[str, Outcome], student: Mapping[str, Outcome]) -> dict[str, Any] | None:
    """The share kept over the tasks on which the teacher is clearly above chance, each task counting the same.

    The sum of what the student is above chance over the sum of what the teacher is; None where there is no such task.
    """
    able = [
        task
        for task, row in teacher.items()
        if not row["lower_is_better"] and share_kept(row["items"], row["items"], row["chance"]) is not None
    ]
    if not able:
        return None

    def above(rows: Mapping[str, Outcome], task: str) -> list[float]:
        return [v - c for v, c in zip(rows[task]["items"], teacher[task]["chance"], strict=True)]

    total = math.fsum(_mean(above(teacher, task)) for task in able)
    share = math.fsum(_mean(above(student, task)) for task in able) / total
    variance = 0.0
    for task in able:
        pairs = zip(above(student, task), above(teacher, task), strict=True)
        variance += (standard_error([s - share * t for s, t in pairs]) or 0.0) ** 2
    error = math.sqrt(variance) / total
    return {"value": share, "stderr": error, "low": share - Z95 * error, "high": share + Z95 * error, "tasks": able}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
