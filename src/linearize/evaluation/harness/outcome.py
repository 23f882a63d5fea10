"""What lm-eval returned for a task, cut down to what a report needs, and student against teacher on the same items."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from linearize.evaluation.harness.definitions import KNOWN
from linearize.evaluation.numbers import NumbersModel
from linearize.metrics.intervals import Z95, paired_difference

CLEAR = 3.0  # standard errors above chance from which a teacher's score is worth a share
Results = Mapping[str, Any]
"""The return value of `lm_eval.simple_evaluate`."""


class Scored(NumbersModel):
    """A task of the report. `metric`: the one reported first (`name,filter`); `metrics`: all, with standard errors;
    `parts`: the first metric of each task in a group; `prompts`: a digest of what was asked."""

    metric: str
    metrics: dict[str, float | None]
    parts: dict[str, float | None]
    n: int
    shots: int
    version: int | float | str | None
    lower_is_better: bool
    prompts: str


class Outcome(Scored):
    """`items`: the first metric of each item; `chance`: what guessing scores there; `tokens`: of its longest request,
    prompt and given answer together."""

    items: list[float]
    chance: list[float]
    tokens: list[int]


def outcomes(task: str, results: Results, count: Callable[[str], int]) -> dict[str, Outcome]:
    """Return one outcome for a task or a group that has numbers of its own, else one for each task that it names.

    `count`: the tokens of a text.
    """
    leaves = list(results["samples"])
    if _numbers(results["results"].get(task, {})):
        return {task: _outcome(task, leaves, results, count)}
    return {leaf: _outcome(leaf, [leaf], results, count) for leaf in leaves}


def _outcome(name: str, leaves: list[str], results: Results, count: Callable[[str], int]) -> Outcome:
    metrics = _numbers(results["results"][name])
    metric = _first(name, metrics)
    key, _, chosen = metric.partition(",")
    items = [sample for leaf in leaves for sample in results["samples"][leaf] if sample["filter"] == chosen]
    parts = {part: _numbers(values).get(metric) for part, values in results["results"].items() if part != name}
    has_choices = results["configs"][leaves[0]]["output_type"] == "multiple_choice"
    asked = "".join(sample["prompt_hash"] + sample["target_hash"] for sample in items)
    return Outcome(
        metric=metric,
        metrics=metrics,
        parts=parts if len(leaves) > 1 else {},
        n=len(items),
        shots=max((results["n-shot"].get(leaf, 0) for leaf in leaves), default=0),
        version=results["versions"].get(name),
        lower_is_better=results["higher_is_better"].get(name, {}).get(key) is False,
        prompts=hashlib.sha256(asked.encode()).hexdigest()[:16],
        items=[float(sample[key]) for sample in items],
        chance=[_chance(sample) if has_choices else 0.0 for sample in items],
        tokens=[max(count(_request(arguments)) for arguments in _requests(sample)) for sample in items],
    )


def _requests(sample: Mapping[str, Any]) -> list[Any]:
    """The arguments of an item's requests; lm-eval gives a list, or from its own log a mapping by number."""
    arguments = sample["arguments"]
    return list(arguments.values() if isinstance(arguments, Mapping) else arguments)


def _request(arguments: Any) -> str:
    """Prompt and given answer of a request; of one that generates, the prompt."""
    parts = list(arguments.values() if isinstance(arguments, Mapping) else arguments)
    return "".join(part for part in parts if isinstance(part, str))


def _numbers(values: Mapping[str, Any]) -> dict[str, float | None]:
    """Metrics and their standard errors, under lm-eval's names; an error that it does not know is None."""
    named = {name: value for name, value in sorted(values.items()) if "," in name}
    return {name: float(v) if isinstance(v, (int, float)) and v == v else None for name, v in named.items()}


def _first(name: str, metrics: Mapping[str, float | None]) -> str:
    """The usual metric of a task of this name, where it was measured; else accuracy or exact match before others."""
    if name in KNOWN and KNOWN[name].metric in metrics:
        return KNOWN[name].metric
    scores = [metric for metric in metrics if "_stderr," not in metric]
    return next((metric for metric in scores if metric.startswith(("acc,", "exact_match,"))), scores[0])


def _chance(sample: Mapping[str, Any]) -> float:
    """What an answer drawn among the choices scores."""
    targets = sample["doc"].get("mc2_targets")
    if targets and "labels" in targets:  # TruthfulQA: the share of the true answers' probability
        return float(sum(targets["labels"]) / len(targets["labels"]))
    return 1.0 / len(sample["resps"])


def write_samples(path: Path, results: Results) -> None:
    """Every item with the answers, one JSON line each; prompts as hashes, since few-shot ones are long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    left_out = {"arguments", "metrics", "doc_hash"}
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for task, samples in results["samples"].items():
            for sample in samples:
                row = {"task": task, **{key: value for key, value in sample.items() if key not in left_out}}
                file.write(json.dumps(row, ensure_ascii=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


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
