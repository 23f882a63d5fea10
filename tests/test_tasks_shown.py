"""Task scores against the teacher: shares, errors, what is shown of them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest

from linearize.evaluation.harness.outcome import Outcome, average_share, averages, contrast, standard_error
from linearize.evaluation.sections.tasks import Tasks
from linearize.evaluation.sections.tasks.measure import task_score
from linearize.evaluation.sections.tasks.present import TasksNumbers

REACH = 128  # tokens


def test_shares_and_errors_against_a_bootstrap() -> None:
    draw = random.Random(3)
    n = 400
    teacher = [float(draw.random() < 0.7) for _ in range(n)]
    student = [t if draw.random() < 0.8 else float(draw.random() < 0.4) for t in teacher]
    share = contrast(outcome(teacher, 0.25), outcome(student, 0.25)).share
    assert share is not None
    means, shares = [], []
    for _ in range(1500):
        chosen = draw.choices(range(n), k=n)
        t, s = (sum(values[i] for i in chosen) / n for values in (teacher, student))
        means.append(s), shares.append((s - 0.25) / (t - 0.25))
    spread = lambda values: math.sqrt(sum((v - sum(values) / len(values)) ** 2 for v in values) / len(values))  # noqa: E731
    assert share.stderr == pytest.approx(spread(shares), rel=0.1)
    assert standard_error(student) == pytest.approx(spread(means), rel=0.1)
    at_chance = outcome([1.0, 0.0] * 50, 0.48)
    assert contrast(at_chance, at_chance).share is None


def outcome(items: Sequence[float], chance: float, shots: int = 0) -> Outcome:
    return Outcome(
        metric="acc,none", metrics={}, parts={}, n=len(items), shots=shots, version=1.0, lower_is_better=False,
        prompts="p", items=list(items), chance=[chance] * len(items), tokens=[60 + i for i in range(len(items))],
    )  # fmt: skip


def task_numbers(students: int) -> dict[str, Any]:
    can, cannot = [1.0] * 80 + [0.0] * 20, [0.0, 1.0] * 50
    rows = {}
    for i, name in enumerate(["teacher", *(f"s{i}" for i in range(students))]):
        worse = [0.0] * 25 * max(i - 1, 0) + can[25 * max(i - 1, 0) :]
        rows[name] = {"piqa": outcome(can, 0.5), "mmlu": outcome(worse, 0.25, 5), "race": outcome(cannot, 0.5)}
    teacher, *others = rows
    numbers = TasksNumbers(
        lm_eval="0", source="x", batch=4, max_length=99, limit=None, window_reach=REACH, notes={},
        commands={"piqa": "lm_eval"},
        models={name: {task: task_score(row, REACH) for task, row in tasks.items()} for name, tasks in rows.items()},
        averages={name: averages(tasks) for name, tasks in rows.items()},
        against_teacher={
            name: {task: contrast(rows[teacher][task], row) for task, row in rows[name].items()} for name in others
        },
        kept={name: average_share(rows[teacher], rows[name]) for name in others},
    )  # fmt: skip
    return json.loads(json.dumps(numbers.to_json()))  # type: ignore[no-any-return]


@pytest.mark.parametrize("students", [0, 1, 3])
def test_what_is_shown(students: int) -> None:
    from matplotlib.figure import Figure

    numbers = task_numbers(students)
    shown = Tasks.present(numbers)
    assert [row["task"] for row in shown.tables[0].rows] == ["piqa", "mmlu", "race", "average", "average without MMLU"]
    assert shown.tables[0].rows[0]["teacher"] == "80.0 ± 4.0%"
    assert shown.tables[0].rows[0]["inside the window"] == "69%"  # 60 to 128 of 60 to 159 tokens
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
