"""Task scores against the teacher: shares, errors, what is shown of them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest

from linearize.evaluation.harness.contrast import share_kept, standard_error, summary
from linearize.evaluation.sections.tasks import Tasks


def test_shares_and_errors_against_a_bootstrap() -> None:
    draw = random.Random(3)
    n = 400
    teacher = [float(draw.random() < 0.7) for _ in range(n)]
    student = [t if draw.random() < 0.8 else float(draw.random() < 0.4) for t in teacher]
    found = share_kept(teacher, student, [0.25] * n)
    assert found is not None
    means, shares = [], []
    for _ in range(1500):
        chosen = draw.choices(range(n), k=n)
        t, s = (sum(values[i] for i in chosen) / n for values in (teacher, student))
        means.append(s), shares.append((s - 0.25) / (t - 0.25))
    spread = lambda values: math.sqrt(sum((v - sum(values) / len(values)) ** 2 for v in values) / len(values))  # noqa: E731
    assert found["stderr"] == pytest.approx(spread(shares), rel=0.1)
    assert standard_error(student) == pytest.approx(spread(means), rel=0.1)
    assert share_kept([1.0, 0.0] * 50, [1.0, 0.0] * 50, [0.48] * 100) is None  # the teacher is at chance


def outcome(items: Sequence[float], chance: float, **fields: Any) -> dict[str, Any]:
    row = {"metric": "acc,none", "metrics": {}, "parts": {}, "n": len(items), "shots": 0, "version": 1.0}
    return {
        **row,
        "lower_is_better": False,
        "items": list(items),
        "chance": [chance] * len(items),
        "prompts": "p",
        **fields,
    }


def shown_numbers(students: int) -> dict[str, Any]:
    can, cannot = [1.0] * 80 + [0.0] * 20, [0.0, 1.0] * 50
    found = {"teacher": {"piqa": outcome(can, 0.5), "mmlu": outcome(can, 0.25, shots=5), "race": outcome(cannot, 0.5)}}
    for i in range(students):
        worse = [0.0] * 25 * i + can[25 * i :]
        found[f"s{i}"] = {
            "piqa": outcome(can, 0.5),
            "mmlu": outcome(worse, 0.25, shots=5),
            "race": outcome(cannot, 0.5),
        }
    facts = {"lm_eval": "0", "source": "x", "batch": 4, "max_length": 99, "limit": None, "notes": {}, "missing": {}}
    numbers = {**facts, "commands": {"piqa": "lm_eval"}, **summary(found, "teacher")}
    return json.loads(json.dumps(numbers))  # type: ignore[no-any-return]


@pytest.mark.parametrize("students", [0, 1, 3])
def test_what_is_shown(students: int) -> None:
    from matplotlib.figure import Figure

    numbers = shown_numbers(students)
    shown = Tasks.present(numbers)
    assert [row["task"] for row in shown.tables[0].rows] == ["piqa", "mmlu", "race", "average", "average without MMLU"]
    assert shown.tables[0].rows[0]["teacher"] == "80.0 ± 4.0%"
    for plot in shown.plots:
        figure = Figure(figsize=(plot.width, plot.height), layout="constrained")
        plot.draw(figure)
        figure.canvas.draw()
    levels = {finding.student: finding.level for finding in shown.findings if finding.student}
    assert levels == {name: level for name, level in [("s0", "good"), ("s1", "bad"), ("s2", "bad")][:students]}
    assert any("noise of chance on race" in finding.text for finding in shown.findings)
    stats = Tasks.headline(numbers)
    assert list(stats) == [f"s{i}" for i in range(students)]
    if students:
        assert [stat.value for stat in stats["s0"]] == ["100.0 ± 0.0%", "100.0 ± 0.0%"]
        assert shown.tables[1].rows[2]["s0: kept"] == "teacher at chance"
        assert numbers["kept"]["s0"]["tasks"] == ["piqa", "mmlu"]
    if students > 1:  # 25 of 80 hits are gone: (0.55 - 0.25) / (0.80 - 0.25)
        assert numbers["against_teacher"]["s1"]["mmlu"]["share"]["value"] == pytest.approx(0.3 / 0.55)
        assert numbers["kept"]["s1"]["value"] == pytest.approx((0.3 + 0.3) / (0.3 + 0.55))
