"""Student against teacher on the same items: differences, shares of what the teacher is above chance, averages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from linearize.evaluation.harness.outcome import Outcome
from linearize.evaluation.numbers import NumbersModel
from linearize.metrics.intervals import Z95, paired_difference

CLEAR = 3.0  # standard errors above chance from which a teacher's score is worth a share


class Share(NumbersModel):
    """The share kept of what the teacher is above chance, with a 95% interval."""

    value: float
    stderr: float
    low: float
    high: float


class AverageShare(Share):
    """The same over several tasks, each counting the same."""

    tasks: list[str]


class Average(NumbersModel):
    """The plain mean of the first metric over tasks."""

    value: float
    stderr: float
    tasks: list[str]


class Contrast(NumbersModel):
    """The mean of student - teacher over `n` items with a 95% interval; `share` None: the teacher is at chance."""

    difference: float
    difference_stderr: float | None
    low: float
    high: float
    n: int
    share: Share | None


def contrast(teacher: Outcome, student: Outcome) -> Contrast:
    """Compare the scores of the same items."""
    assert teacher.prompts == student.prompts, "teacher and student were asked different things"
    difference = paired_difference(student.items, teacher.items)
    return Contrast(
        difference=difference.value,
        difference_stderr=standard_error([s - t for s, t in zip(student.items, teacher.items, strict=True)]),
        low=difference.low,
        high=difference.high,
        n=difference.n,
        share=_share([(teacher, student)]) if _clearly_above_chance(teacher) else None,
    )


def average_share(teacher: Mapping[str, Outcome], student: Mapping[str, Outcome]) -> AverageShare | None:
    """The share kept over the tasks on which the teacher is clearly above chance; None where there is no such task."""
    tasks = [name for name, row in teacher.items() if not row.lower_is_better and _clearly_above_chance(row)]
    if not tasks:
        return None
    return AverageShare(**_share([(teacher[task], student[task]) for task in tasks]).to_json(), tasks=tasks)


def averages(rows: Mapping[str, Outcome]) -> dict[str, Average]:
    """`all`, and `without_mmlu` where both kinds are there: an average hides what MMLU loses. Perplexities stay out."""
    scores = {task: row for task, row in rows.items() if not row.lower_is_better}
    without = {task: row for task, row in scores.items() if not task.startswith("mmlu")}
    means = {"all": _average(scores)}
    return {**means, "without_mmlu": _average(without)} if 0 < len(without) < len(scores) else means


def mean(values: Sequence[float]) -> float:
    """The mean of at least one value, its sum rounded once."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent items, as lm-eval has it; None for fewer than two."""
    n = len(values)
    if n < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (n - 1) / n)


def _average(rows: Mapping[str, Outcome]) -> Average:
    count = max(len(rows), 1)
    error = math.sqrt(math.fsum((standard_error(row.items) or 0.0) ** 2 for row in rows.values()))
    value = math.fsum(mean(row.items) for row in rows.values()) / count
    return Average(value=value, stderr=error / count, tasks=list(rows))


def _clearly_above_chance(row: Outcome) -> bool:
    """Elsewhere a share would be noise divided by noise."""
    above = _above(row, row)
    error = standard_error(above)
    return error is not None and mean(above) > 0 and mean(above) > CLEAR * error


def _above(row: Outcome, teacher: Outcome) -> list[float]:
    return [score - chance for score, chance in zip(row.items, teacher.chance, strict=True)]


def _share(pairs: Sequence[tuple[Outcome, Outcome]]) -> Share:
    """(student - chance) / (teacher - chance), both summed over tasks; the error by the delta method, items paired."""
    above = [(_above(teacher, teacher), _above(student, teacher)) for teacher, student in pairs]
    total = math.fsum(mean(theirs) for theirs, _ in above)
    share = math.fsum(mean(ours) for _, ours in above) / total
    errors = [standard_error([s - share * t for t, s in zip(theirs, ours, strict=True)]) for theirs, ours in above]
    error = math.sqrt(math.fsum((e or 0.0) ** 2 for e in errors)) / total
    return Share(value=share, stderr=error, low=share - Z95 * error, high=share + Z95 * error)
