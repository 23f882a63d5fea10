"""What lm-eval returned for a task, cut down to what a report needs: metrics, and one score for each item."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearize.evaluation.harness.definitions import KNOWN
from linearize.evaluation.numbers import NumbersModel

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
    """`items`: the first metric of each item; `chance`: what guessing scores there."""

    items: list[float]
    chance: list[float]


def outcomes(task: str, results: Results) -> dict[str, Outcome]:
    """Return one outcome for a task or a group that has numbers of its own, else one for each task that it names."""
    leaves = list(results["samples"])
    if _numbers(results["results"].get(task, {})):
        return {task: _outcome(task, leaves, results)}
    return {leaf: _outcome(leaf, [leaf], results) for leaf in leaves}


def _outcome(name: str, leaves: list[str], results: Results) -> Outcome:
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
    )


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
