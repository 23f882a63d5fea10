"""What lm-eval returned for a task, cut down to what a report needs: metrics, and one score an item."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from linearize.evaluation.harness.catalogue import Entry

Outcome = dict[str, Any]
"""By row of the report (a task, or each task behind a tag): `metrics`, `parts`, `metric`, `items`, ..."""


def outcomes(entry: Entry, found: Mapping[str, Any], multiple_choice: Mapping[str, bool]) -> dict[str, Outcome]:
    """One outcome for a task or a group that has numbers of its own, one for each task behind others. JSON-able.

    `found`: lm-eval's results; `multiple_choice`: by task, whether its answers are choices.
    """
    leaves = list(found["samples"])
    if _numbers(found["results"].get(entry.task, {})):
        return {entry.task: _outcome(entry.task, entry, leaves, found, multiple_choice)}
    return {leaf: _outcome(leaf, entry, [leaf], found, multiple_choice) for leaf in leaves}


def _outcome(
    name: str, entry: Entry, leaves: list[str], found: Mapping[str, Any], choices: Mapping[str, bool]
) -> Outcome:
    metrics = _numbers(found["results"][name])
    metric = entry.known.metric if entry.known else _first(metrics)
    samples = [sample for leaf in leaves for sample in found["samples"][leaf]]
    kept = [sample for sample in samples if sample["filter"] == metric.partition(",")[2]]
    key = metric.partition(",")[0]
    parts = {part: _numbers(values).get(metric) for part, values in found["results"].items() if part != name}
    return {
        "metric": metric,
        "metrics": metrics,
        "parts": parts if len(leaves) > 1 else {},
        "n": len(kept),
        "shots": max((found["n-shot"].get(leaf, 0) for leaf in leaves), default=0),
        "version": found["versions"].get(name),
        "lower_is_better": found["higher_is_better"].get(name, {}).get(key) is False,
        "items": [float(sample[key]) for sample in kept],
        "chance": [_chance(sample, choices.get(leaves[0], False)) for sample in kept],
        "prompts": _digest(sample["prompt_hash"] + sample["target_hash"] for sample in kept),
    }


def _numbers(values: Mapping[str, Any]) -> dict[str, float | None]:
    """Metrics and their standard errors, under lm-eval's names; an error that it does not know is None."""
    found: dict[str, float | None] = {}
    for name, value in values.items():
        if "," in name:
            found[name] = float(value) if isinstance(value, (int, float)) and value == value else None
    return dict(sorted(found.items()))


def _first(metrics: Mapping[str, float | None]) -> str:
    named = [name for name in metrics if "_stderr," not in name]
    preferred = [name for name in named if name.startswith(("acc,", "exact_match,"))]
    return (preferred or named)[0]


def _chance(sample: Mapping[str, Any], multiple_choice: bool) -> float:
    """What an answer drawn among the choices scores; 0 where the answer is written."""
    if not multiple_choice:
        return 0.0
    targets = sample["doc"].get("mc2_targets")
    if targets and "labels" in targets:  # TruthfulQA: the share of the true answers' probability
        return sum(targets["labels"]) / len(targets["labels"])
    return 1.0 / len(sample["resps"])


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def write_samples(path: Path, found: Mapping[str, Any]) -> None:
    """Every item with the answers, one JSON line each; prompts as hashes, since few-shot ones are long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    left_out = {"arguments", "metrics", "doc_hash"}
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for task, samples in found["samples"].items():
            for sample in samples:
                row = {"task": task, **{key: value for key, value in sample.items() if key not in left_out}}
                file.write(json.dumps(row, ensure_ascii=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)
